"""`inlay compare` from its command line to its report."""

import json

import pytest

from command import run
from inlay import Comparison
from inlay.study import compare as module
from inlay.study.comparison import Row

ROWS = [
    Row("lora", 3e-3, 4, {1e-3: 0.7, 3e-3: 0.8}, True, {"accuracy": [0.8, 0.9]}, [0.8, 0.8], steps=20),
    Row("probe", 1e-2, 4, {1e-2: 0.5}, True, {"accuracy": [0.5, 0.6]}, [0.5, 0.5], steps=20),
]


@pytest.fixture
def asked(monkeypatch):
    """What `compare` is asked for; it answers at once."""
    found = {}

    def compare(task, train, **options):
        found.update(task=task, train=train, **options)
        print("train: 9 examples")
        counts = {"train": 9, "validation": 3, "test": 3}
        return Comparison(task.model, task.dataset, "image-classification", "accuracy", True, [0, 1], counts, {}, ROWS)

    monkeypatch.setattr(module, "compare", compare)
    return found


def test_options_of_the_verb_of_the_task_and_of_training_reach_it(asked, capsys, monkeypatch, tmp_path):
    status, out, err = run(
        capsys, monkeypatch, "compare", "--task", "builtin:digits", "--base", "builtin:vit-tiny", "-o", tmp_path / "c",
        "--methods", "probe, lora", "--rates", "1e-3,3e-3", "--seeds", "0,1", "--steps", 20, "--batch-size", 8,
        "--augment", "none", "--label-smoothing=0.1", "--warmup", 0, "--jobs", 3, "--width", 4, "--no-forgetting",
    )  # fmt: skip
    assert (status, err) == (0, "train: 9 examples\n")
    task, train = asked["task"], asked["train"]
    assert (task.model, task.dataset, task.augment, task.label_smoothing) == (
        "builtin:vit-tiny",
        "builtin:digits",
        "none",
        0.1,
    )
    assert (train.batch_size, train.warmup, train.output_dir, train.workers) == (8, 0, str(tmp_path / "c"), 0)
    wanted = {"methods": ["probe", "lora"], "learning_rates": [1e-3, 3e-3], "seeds": [0, 1], "steps": 20, "jobs": 3}
    assert asked.items() >= {**wanted, "seconds": None, "costs": True, "forgetting": False, "width": 4}.items()
    assert "lora" in out and str(tmp_path / "c" / "comparison.html") in out
    assert {"comparison.html", "comparison.json", "comparison.csv", "comparison.md"} <= {
        path.name for path in (tmp_path / "c").iterdir()
    }


def test_json_is_all_that_is_printed(asked, capsys, monkeypatch, tmp_path):
    arguments = ["--task", "builtin:shapes", "--base", "builtin:vit-tiny", "-o", tmp_path / "c", "--json"]
    status, out, _ = run(capsys, monkeypatch, "compare", *arguments)
    assert status == 0 and Comparison.from_dict(json.loads(out)).rows == ROWS


@pytest.mark.parametrize(
    ("base", "data", "kind", "task"),
    [
        ("builtin:vit-tiny", "photos", [], "ImageTask"),
        ("builtin:gpt2-tiny", "builtin:restaurants", [], "TextTask"),
        ("builtin:gpt2-tiny", "builtin:families", [], "SequenceTask"),
        ("builtin:gpt2-tiny", "mails.csv", ["--kind", "text-classification"], "SequenceTask"),
        ("builtin:sam-tiny", "builtin:scenes", [], "MaskTask"),
        ("builtin:sam-tiny", "builtin:volumes", [], "VolumeTask"),
    ],
)
def test_the_task_follows_from_base_and_data(asked, capsys, monkeypatch, tmp_path, base, data, kind, task):
    run(capsys, monkeypatch, "compare", "--task", data, "--base", base, "-o", tmp_path / "c", *kind)
    assert type(asked["task"]).__name__ == task and asked["task"].dataset == data


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", 1, "--steps", 5], "the budget of a run is in epochs, steps or seconds; give one"),
        (["--seeds", "1,b"], "--seeds must be whole numbers with commas between them, got '1,b'"),
        (["--rates", "fast"], "--rates must be numbers with commas between them, got 'fast'"),
        (["--augmen", "none"], "there is no option --augmen. Did you mean --augment?"),
        (["--kind", "text-generation"], "cannot be loaded for text-generation"),
        (["--batch-size", 0], "batch_size must be"),
        (["--methods", "nothing"], "unknown method 'nothing'; choose some of probe, lora"),
    ],
)
def test_a_mistake_is_one_line(capsys, monkeypatch, tmp_path, arguments, sentence):
    both = ["--task", "builtin:digits", "--base", "builtin:vit-tiny", "-o", tmp_path / "c"]
    status, out, err = run(capsys, monkeypatch, "compare", *both, *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and sentence in err
