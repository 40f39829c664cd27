"""The command line of a recipe: options, settings files, and mistakes in both."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from inlay import Decoding, TrainConfig, option, run_recipe
from places import ROOT


@dataclass
class Recipe:
    model: str = field(default="builtin:gpt2-tiny", metadata={"help": "Base."})
    rank: int = field(default=8, metadata={"help": "Rank."})
    bits: Literal["8bit", "4bit"] | None = field(default=None, metadata={"help": "Of the base."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Some."})
    merge: bool = field(default=False, metadata={"help": "Or not."})


@dataclass
class Kinds:
    """Some kinds of options."""

    rate: float = option(0.5, "A rate, in 100 %.", above=0, most=1)
    rates: list[float] = option([], "More of them.", above=0)
    kinds: list[Literal["a", "b"]] = option(["a"], "One or both.")
    shuffle: bool = option(True, "Or not.")


def parsed(monkeypatch, *arguments, train=None, defaults=None):
    """What `main` is called with."""
    found = []
    defaults = defaults or [Recipe(model="other"), Decoding(max_new_tokens=7), *([train] if train else [])]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    run_recipe(lambda *settings: found.extend(settings), *defaults)
    return found


def refused(monkeypatch, capsys, *arguments, **settings):
    with pytest.raises(SystemExit) as status:
        parsed(monkeypatch, *arguments, **settings)
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
        changed = Recipe("other", 4, None, ["d"], False)  # options behind the file replace what it says
        assert parsed(monkeypatch, file, "--rank", 4, "--names", "d", "--merge", "false") == [changed, decoding]


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
    ("option", "sentence"),
    [
        ("--num_train_epochs", "Here it is --epochs."),
        ("--num-train-epochs", "Here it is --epochs."),
        ("--per_device_train_batch_size=8", "Here it is --batch_size, of all processes together."),
        ("--lr", "Here it is --learning_rate."),
        ("--lora_r", "Here it is --rank."),
        ("--fp16", "Here it is --precision fp16."),
        ("--max_steps", "Here it is --steps."),
        ("--gradient_accumulation_steps", "Here it is --accumulate: the pieces in which"),
        ("--num_beams", "Here it is --beams."),
        ("--load_in_8bit", "--help lists all."),  # an option that this recipe has under no name
        ("--learn", "Did you mean --learning_rate?"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_the_one_here(monkeypatch, capsys, option, sentence):
    assert sentence in refused(monkeypatch, capsys, option, 1, train=TrainConfig())


def test_a_mistake_is_answered_without_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes/lora_vit.py"), "--lr", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and "error: there is no option --lr. Here it is --learning_rate." in done.stderr
    assert "inlay.tasks.options" in imported
    assert not imported & {"torch", "transformers", "peft", "accelerate", "datasets", "numpy"}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_speaks_before_the_others(monkeypatch, capsys, rank):
    waited = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("inlay.cli.recipe.time.sleep", waited.append)
    assert "there is no option --foo" in refused(monkeypatch, capsys, "--foo")
    assert len(waited) == rank


def test_booleans_numbers_and_lists_as_users_write_them(monkeypatch):
    recipe, _ = parsed(monkeypatch, "--merge", "no", "--bits=4bit", "--names", "x")
    assert (recipe.merge, recipe.bits, recipe.names) == (False, "4bit", ["x"])
    (run,) = parsed(monkeypatch, "--shuffle=false", "--kinds", "a", "b", "--rates", "1e-3", 2, defaults=[Kinds()])
    assert run == Kinds(shuffle=False, kinds=["a", "b"], rates=[1e-3, 2.0])
    assert parsed(monkeypatch, "--no-shuffle", defaults=[Kinds()]) == [Kinds(shuffle=False)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rate", "-1e-3"], "rate must be a number over 0 and at most 1, got -0.001."),
        (["--rate", "nan"], "rate must be a number over 0 and at most 1, got nan."),
        (["--rates", "1", "0"], "rates must be a number over 0, got 0.0."),
        (["--kinds", "c"], "argument --kinds: invalid choice: 'c'"),
        (["--shuffle", "perhaps"], "argument --shuffle: must be true or false, got 'perhaps'."),
        (["three"], "'three' is not an option; options look like --rate. --help lists them."),
    ],
)
def test_a_value_out_of_its_bounds_is_one_sentence(monkeypatch, capsys, arguments, sentence):
    assert sentence in refused(monkeypatch, capsys, *arguments, defaults=[Kinds()])


def test_help_says_each_option_with_its_default(monkeypatch, capsys):
    with pytest.raises(SystemExit) as status:
        parsed(monkeypatch, "--help", defaults=[Kinds()])
    out = capsys.readouterr().out
    assert (
        status.value.code == 0 and "Some kinds" in out and "A rate, in 100 %. (default: 0.5)" in " ".join(out.split())
    )


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.json", "{bad", "s.json is not valid JSON: "),
        ("s.yaml", "rank: [", "s.yaml is not valid YAML: "),
        ("s.yaml", "- rank", "must map option names to values, but holds a list; write name: value."),
        ("s.json", '{"rnk": 3}', "sets rnk, but there is no such option. Did you mean --rank?"),
        ("s.yaml", "rank: many", "argument --rank: invalid int value: 'many'"),
        ("s.yaml", "rank: null", "sets rank to None, which is not a value; set one, or leave rank out."),
        ("s.yaml", "bits: 2bit", "invalid choice: '2bit'"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(monkeypatch, capsys, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    assert sentence in refused(monkeypatch, capsys, tmp_path / name)
