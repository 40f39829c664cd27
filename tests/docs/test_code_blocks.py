"""Every code block of README and docs is run or parsed: what a reader types is what the code takes.

An HTML comment in front of a block says what is done with it: `not run: REASON` for Python that needs the Hub or the
reader's own files (its names and keyword arguments are checked), `run: WHERE` for commands that are run.
"""

import ast
import importlib
import inspect
import json
import re
import runpy
import shutil
import sys
from pkgutil import iter_modules
from urllib.parse import urlparse

import pytest
import typer
import yaml

import inlay
from docs.blocks import PAGES, added_options, make_targets, read_blocks, read_commands
from inlay import InlayError
from inlay.adapters.file import read_adapter
from inlay.adapters.task import find_task_of_file
from inlay.cli import app as cli
from inlay.cli import evaluate as evaluate_verb
from inlay.cli import predict as predict_verb
from inlay.cli import recipe as recipe_cli
from inlay.serve import server
from inlay.tasks import TASKS, find_task
from inlay.tasks.base import read_task
from places import ROOT

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language in ("bash", "") for command in read_commands(block)]


def name(page):
    return str(page.relative_to(ROOT))


def of_language(*languages):
    return [block for block in BLOCKS if block.language in languages]


def test_there_are_blocks_and_each_has_a_language_that_is_tested():
    assert len(BLOCKS) > 40
    for block in BLOCKS:
        assert block.language in ("bash", "python", "yaml", "json", "text", "ini", "dockerfile", ""), block
        if block.language == "":
            assert block.text.startswith("$ "), f"{block}: only the output of a command has no language"
        if block.note:
            assert re.fullmatch(r"(not run|run): \w.+", block.note), f"{block}: {block.note}"


# ---- commands


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_one_that_the_code_takes(command, monkeypatch, tmp_path):
    write_files(command.block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    check_command(command.words, monkeypatch)


def check_command(words, monkeypatch):
    program, *arguments = words
    if program == "inlay":
        check_verb(arguments)
    elif program == "accelerate":
        check_launch(arguments, monkeypatch)
    elif program == "python":
        check_script(*arguments, monkeypatch=monkeypatch)
    elif program == "make":
        assert set(arguments) <= make_targets()
    elif program == "pip":
        check_install(arguments)
    elif program == "curl":
        check_request(arguments)
    else:
        assert words[0] == "cd" and len(words) == 2, f"unknown command: {words}"


def check_request(arguments):
    """The address is a route of the server."""
    (path,) = (url.path for url in map(urlparse, arguments) if url.scheme == "http" and url.port == 8000)
    modules = [importlib.import_module(found.name) for found in iter_modules(server.__path__, f"{server.__name__}.")]
    routes = [route for module in modules if hasattr(module, "router") for route in module.router.routes]
    assert any(route.path_regex.match(path) for route in routes), f"no route {path}"


def check_verb(arguments):
    group = typer.main.get_command(cli.app)
    verb, *rest = arguments
    assert verb in group.commands
    if verb in OF_TASKS:  # it has the options of the adapter's own task
        OF_TASKS[verb].build(task_of(verb, rest)).make_context(verb, rest)
        return
    group.commands[verb].make_context(verb, rest)  # parses and checks, and runs nothing


OF_TASKS = {"predict": predict_verb.COMMAND, "evaluate": evaluate_verb.COMMAND}


def task_of(verb, arguments):
    """What the adapter of a command is for: in the pages its folder has the name of the recipe that makes it."""
    adapter = OF_TASKS[verb].find_adapter(arguments)
    if "spatial_sam" in adapter:
        return find_task("volume-segmentation")
    if adapter.startswith("builtin:"):
        return read_task(adapter)
    if (ROOT / adapter / "adapter_config.json").is_file():
        return find_task_of_file(read_adapter(ROOT / adapter))
    family = re.search(r"runs/\w+_([a-z0-9]+)/", adapter)
    return find_task(FAMILIES[family[1] if family else "vit"])


FAMILIES = {
    "vit": "image-classification",
    "gpt2": "text-generation",
    "bert": "text-classification",
    "sam": "mask-generation",
    "lora": "text-to-image",
}


def check_launch(arguments, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    launch, *rest = arguments
    assert launch == "launch"
    parsed = launch_command_parser().parse_args(rest)
    if parsed.config_file:
        _validate_launch_command(parsed)  # an unknown key in the file is an error
    check_script(parsed.training_script, *parsed.training_script_args, monkeypatch=monkeypatch)


def check_script(script, *arguments, monkeypatch):
    path = ROOT / script
    assert path.is_file(), script
    if path.parent.name == "benchmarks":
        named = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        assert set(named) <= added_options(path)
        return
    run_recipe, settings = recipe_cli.run_recipe, []

    def parse_only(main, *defaults):
        run_recipe(lambda *parsed: settings.extend(parsed), *defaults)

    with monkeypatch.context() as patch:
        patch.setattr(recipe_cli, "run_recipe", parse_only)
        patch.setattr(recipe_cli, "_check_destination", lambda main, settings: (None, False))  # asks the Hub
        patch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(path), run_name="__main__")
    assert settings


def check_install(arguments):
    import tomllib

    assert arguments[:2] == ["install", "-e"] and len(arguments) == 3
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[2])
    assert extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set((extras[1] or "").split(",")) - {""} <= set(known)


def write_files(page, folder):
    """The blocks with a title, as the files that a reader makes of them."""
    for block in read_blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.note.startswith("run:")], ids=str)
def test_commands_that_need_no_connection_run(block, monkeypatch, capsys, tmp_path):
    shutil.copytree(ROOT / "adapters_hub", tmp_path / "adapters_hub")
    monkeypatch.chdir(tmp_path)
    commands = read_commands(block)
    assert commands
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.words)
        with pytest.raises(SystemExit) as status:
            cli.main()
        out = capsys.readouterr().out
        assert not status.value.code, command
        assert "digits-lora-vit-tiny" in out or "would go to you/digits" in out


# ---- Python


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in read_blocks(page))], ids=name
)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """Those of a page one after the other, as a reader would type them into one session."""
    (tmp_path / "adapters_hub").symlink_to(ROOT / "adapters_hub")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.language == "python" and not block.note.startswith("not run:"):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), scope)


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_names_and_keyword_arguments_are_those_of_the_code(block):
    tree, names = ast.parse(block.text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name): importlib.import_module(a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("inlay"):
                    raise
                pytest.skip(f"{error.name} is not installed")  # it belongs to an extra
            names |= {(a.asname or a.name): getattr(module, a.name) for a in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = resolve(call.func, names)
        if inspect.ismodule(called):  # inlay.combine is a package and, called, its function
            called = getattr(called, called.__name__.rpartition(".")[2])
        if called is None or not getattr(called, "__module__", "").startswith("inlay"):
            continue
        known = inspect.signature(called).parameters
        unknown = {keyword.arg for keyword in call.keywords} - set(known)
        assert not unknown, f"{block}: {ast.unparse(call)}"
        inspect.signature(called).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})


def resolve(node, names):
    """What a name or `module.name` stands for; None for anything else, such as a method of a value."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(owner := resolve(node.value, names)):
        return getattr(owner, node.attr)
    return None


# ---- settings


@pytest.mark.parametrize("block", of_language("json"), ids=str)
def test_json_is_json(block):
    json.loads(block.text)


# Those of the page on a server's operation are read by test_operation.py, as are unit and Dockerfile.
SETTINGS = [block for block in of_language("yaml") if block.page.name != "serve_operation.md"]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_yaml_is_settings_of_accelerate_or_of_a_recipe(block):
    settings = yaml.safe_load(block.text)
    assert isinstance(settings, dict)
    users = [command for command in COMMANDS if block.title in command.words]
    assert users, f"{block}: no command uses {block.title}"
    if "compute_environment" not in settings:
        return  # parsed with the recipe's command
    from accelerate.commands.launch import launch_command_parser

    options = vars(launch_command_parser().parse_args(["script.py"]))
    inner = [key for name in ("fsdp_config", "deepspeed_config") for key in settings.get(name, {})]
    assert set(inner) <= set(options), "a key that accelerate would hand on without reading it"


def test_a_wrong_line_is_found(monkeypatch):
    """The checks above can fail: each kind of mistake that was once in these pages."""
    for words in (
        "inlay predict adapter image.png --overlays x.png",
        "inlay predict adapter",
        "accelerate launch recipes/lora_vit.py --ranks 8",
        "accelerate launch recipes/lora_bit.py",
        "python tests/benchmarks/bank.py --block 2",
        "make demos",
        "pip install -e .[quantise]",
    ):
        with pytest.raises((AssertionError, InlayError, typer.TyperException, SystemExit)):
            check_command(words.split(), monkeypatch)


# ---- links and words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_paths_exist(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"
    for path in re.findall(r"`((?:recipes|tests|src|docs|adapters_hub)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"


FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_table_of_methods_is_that_of_the_code():
    text = (ROOT / "README.md").read_text()
    for name, method in inlay.METHODS.items():
        cells = [name, method.paper, method.attaches, method.width, "yes" if method.merges else "no"]
        assert f"| {' | '.join([*cells, ', '.join(method.bases)])} |" in text


def test_the_table_of_tasks_is_that_of_the_code():
    table = (ROOT / "README.md").read_text().split("## Tasks")[1].split("## ")[0]
    assert set(re.findall(r"^\| ([a-z-]+) \| `", table, re.MULTILINE)) == set(TASKS)


def test_every_recipe_is_named_in_the_pages():
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [path.name for path in (ROOT / "recipes").glob("*.py") if path.name not in text]
    assert not missing
