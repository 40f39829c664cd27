"""The code blocks of the pages, and what a command in them is checked against."""

import ast
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```([\w-]*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- ((?:(?!-->).)*) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its `title=`, and the HTML comment in front of it, which says how it is tested."""

    page: Path
    line: int
    language: str
    title: str | None
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Command:
    """One command of a shell block."""

    block: Block
    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join(self.words)}"


def read_blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        note = COMMENT.search(before)
        title = re.search(r'title="(.*?)"', match[3])
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                match[2],
                title[1] if title else None,
                note[1] if note else "",
                match[4],
            )
        )
    return found


def read_commands(block: Block) -> list[Command]:
    """Of a shell block every line; of an output block those after `$ `, as a reader would type them."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language != "bash":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words, variables = shlex.split(line, comments=True), {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        if words:
            found.append(Command(block, words, variables))
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def added_options(script: Path) -> set[str]:
    """The options of a script with argparse, read from its source: importing it would load all that it measures."""
    calls = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call))
    added = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument")
    return {argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant)}
