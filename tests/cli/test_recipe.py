"""The command line of a recipe: options, settings files, and mistakes in both."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from inlay import Decoding, run_recipe


@dataclass
class Recipe:
    model: str = field(default="builtin:gpt2-tiny", metadata={"help": "Base."})
    rank: int = field(default=8, metadata={"help": "Rank."})
    bits: Literal["8bit", "4bit"] | None = field(default=None, metadata={"help": "Of the base."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Some."})
    merge: bool = field(default=False, metadata={"help": "Or not."})


def parsed(monkeypatch, *arguments):
    """What `main` is called with."""
    found = []
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    run_recipe(lambda *settings: found.extend(settings), Recipe(model="other"), Decoding(max_new_tokens=7))
    return found


def refused(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        parsed(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_file_says_what_the_command_line_does_and_leaves_the_rest_as_it_was(monkeypatch, tmp_path):
    recipe, decoding = parsed(monkeypatch, "--rank", -3, "--names", "b", "c", "--merge", "--temperature", "1e-1")
    assert recipe == Recipe("other", -3, None, ["b", "c"], True)
    assert decoding == Decoding(max_new_tokens=7, temperature=0.1)
    yaml, json = tmp_path / "s.yaml", tmp_path / "s.json"
    yaml.write_text("rank: -3\nnames: [b, c]\nmerge: true\ntemperature: 1e-1\nbits: null\n")  # 1e-1 is text in YAML
    json.write_text('{"rank": -3, "names": ["b", "c"], "merge": true, "temperature": 0.1, "model": "other"}')
    for file in (yaml, json):
        assert parsed(monkeypatch, file) == [recipe, decoding]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--foo", 3], "there is no option --foo. --help lists all."),
        (["--rnk=3"], "there is no option --rnk=3. Did you mean --rank?"),
        (["--rank", "many"], "argument --rank: invalid int value: 'many'"),
        (["--bits", "2bit"], "invalid choice: '2bit'"),
        (["--beams", 0], "beams must be a whole number of at least 1"),
        (["none.json"], "there is no settings file none.json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(monkeypatch, capsys, arguments, sentence):
    assert sentence in refused(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.json", "{bad", "expected JSON in "),
        ("s.yaml", "rank: [", "expected YAML in "),
        ("s.yaml", "- rank", "but got list. Write name: value."),
        ("s.json", '{"rnk": 3}', "sets rnk, but there is no such option. Did you mean --rank?"),
        ("s.yaml", "rank: many", "argument --rank: invalid int value: 'many'"),
        ("s.yaml", "rank: null", "expected a value for rank"),
        ("s.yaml", "bits: 2bit", "invalid choice: '2bit'"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(monkeypatch, capsys, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    assert sentence in refused(monkeypatch, capsys, tmp_path / name)
