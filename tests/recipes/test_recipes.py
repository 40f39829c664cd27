"""The recipes as a user runs them, on the embedded base and data, with few steps."""

import ast
import json
import re
import runpy
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from PIL import Image

from inlay import (
    ImageTask,
    MaskTask,
    SequenceTask,
    TextTask,
    TextToImageTask,
    TrainConfig,
    VolumeTask,
    load_adapter,
    read_adapter,
)
from places import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
PUBLIC = [path for path in RECIPES if path.parent.name == "recipes"]
FAMILIES = {
    "vit": ImageTask,
    "squeezenet": ImageTask,
    "mobilenet": ImageTask,
    "gpt2": TextTask,
    "sam": MaskTask,
    "bert": SequenceTask,
    "lora": TextToImageTask,
}
ADAPTERS = [p for p in PUBLIC if p.stem.rpartition("_")[2] in FAMILIES and not p.stem.startswith(("compare", "prune"))]


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / name), *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "lora_vit.py", "--output_dir", folder, "--epochs", 0.2, "--workers", 0)
    return folder


def test_lora_vit_trains_measures_and_saves(trained):
    file = read_adapter(trained / "adapter")
    assert file.base_name == "builtin:vit-tiny" and file.labels == list("0123456789")
    trainable = file.metrics["cost"]["trainable_parameters"]
    assert file.bytes_weights <= 4 * trainable + 8000
    assert len((trained / "log.jsonl").read_text().splitlines()) == 10  # nine steps and one evaluation
    assert 0 <= file.metrics["validation"]["accuracy"] <= 1
    assert load_adapter(trained / "adapter").deviation < 1e-4


@pytest.mark.parametrize(
    ("recipe", "arguments", "method"),
    [
        ("bottleneck_vit.py", ["--width", 4], "INLAY_BOTTLENECK"),
        ("bottleneck_vit.py", ["--sites", "mlp", "--placement", "parallel", "--scale", 0.1], "INLAY_BOTTLENECK"),
        ("bottleneck_vit.py", ["--activation", "none"], "INLAY_BOTTLENECK"),
        ("prompt_vit.py", ["--depth", "shallow"], "INLAY_VISUAL_PROMPT"),
        ("prefix_vit.py", ["--projection", 16], "INLAY_ATTENTION_PREFIX"),
        ("ssf_vit.py", [], "INLAY_SSF"),
        ("convpass_vit.py", ["--width", 4, "--sites", "attention"], "INLAY_CONVPASS"),
        ("conv_adapter_squeezenet.py", ["--placement", "residual_sequential"], "INLAY_CONV_ADAPTER"),
        ("partial_vit.py", [], "INLAY_PARTIAL"),
        ("partial_vit.py", ["--train_what", "bias"], "INLAY_PARTIAL"),
        ("composite_vit.py", ["--methods", "lora", "prefix", "prompt"], "INLAY_COMPOSITE"),
        ("lora_squeezenet.py", ["--rank", 4], "LORA"),
        ("lora_mobilenet.py", ["--rank", 4], "INLAY_CONV_LORA"),
    ],
)
def test_the_other_methods_train_save_and_load(monkeypatch, two_tasks, tmp_path, recipe, arguments, method):
    options = ["--dataset", two_tasks[0], "--output_dir", tmp_path / "run", "--epochs", 1, "--workers", 0]
    run(monkeypatch, recipe, *options, *arguments)
    file = read_adapter(tmp_path / "run" / "adapter")
    assert file.config["peft_type"] == method
    assert load_adapter(file.folder).deviation < 1e-4
    card = (file.folder / "README.md").read_text()
    assert method == "LORA" or "import inlay" in card, "plain peft needs it to know the method"


def test_a_composite_of_unknown_methods_is_one_sentence(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, "composite_vit.py", "--output_dir", tmp_path / "run", "--methods", "lora", "nothing")
    err = capsys.readouterr().err
    assert "argument --methods: invalid choice: 'nothing'" in err and "prompt" in err


def test_lora_vit_keeps_a_finished_run(trained, monkeypatch, capsys):
    before = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    run(monkeypatch, "lora_vit.py", "--output_dir", trained, "--epochs", 0.2, "--workers", 0)
    assert "finished run, which is kept" in capsys.readouterr().out
    assert (trained / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_predict_recipe_reads_what_was_saved(trained, monkeypatch, capsys, tmp_path):
    run(monkeypatch, "predict.py", "--adapter", trained / "adapter", "--grid", tmp_path / "sheet.png", "--merge")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("a handwritten") for line in lines) == 16 and (tmp_path / "sheet.png").is_file()


def test_compare_prints_one_row_a_method(monkeypatch, capsys, tmp_path):
    for name, found in (
        ("measure_trial", {}),
        ("measure_forgetting", {}),
        ("remember_base", SimpleNamespace(remarks=[])),
    ):
        monkeypatch.setattr(f"inlay.study.problem.{name}", lambda *_, found=found, **__: found)
    for i in range(30):  # two labels, black and white
        path = tmp_path / "data" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + i), (255 * (i % 2),) * 3).save(path)
    arguments = ["--output_dir", tmp_path / "c", "--epochs", 0.1, "--seeds", 0, "--methods", "probe", "--dataset"]
    run(monkeypatch, "compare.py", *arguments, tmp_path / "data")
    (row,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"]
    assert row["method"] == "probe" and len(row["scores"]["accuracy"]) == 1 and len(row["curve"]) >= 4
    assert "| probe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "builtin:none"], "unknown embedded model 'builtin:none'; choose one of"),
        (["--dataset", "builtin:none"], "builtin:digits"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--batch_size", "0"], "batch_size must be"),
        (["--tracker", "nothing"], "unknown tracker"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, sentence):
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, "lora_vit.py", "--output_dir", tmp_path / "run", *arguments)
    err = capsys.readouterr().err
    assert status.value.code == 2 and "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert sentence in error


IMPOSSIBLE = {
    "rank": (0, -2),
    "alpha": (0,),
    "width": (0,),
    "length": (0,),
    "projection": (0,),
    "last": (0, -1),
    "token": (0,),
    "dropout": (1.5, -0.1, "nan"),
    "label_smoothing": (2, -0.1),
    "max_length": (0,),
    "crop": (0,),
    "spacing_mm": ("-1",),
    "flip": (3,),
    "learning_rates": (0,),
    "density": (0, 1.5),
    "budget_mb": (0,),
    "requests": (0,),
    "learning_rate": (0, "-1e-3", "inf"),
    "epochs": (0, -1),
    "batch_size": (0,),
    "warmup": (1.1,),
    "seed": (-1,),
    "max_drop": (-0.1, 1.1),
    "min_agreement": (1.1,),
    "share": (0, 1.1),
    "image_size": (0,),
    "snr_gamma": (0,),
    "drop_prompts": (1, -0.1),
    "prior_images": (0,),
    "prior_weight": (0,),
    "validation_images": (0,),
    "sampling_steps": (0,),
    "guidance": (-1,),
}


@pytest.mark.parametrize("path", PUBLIC, ids=lambda p: p.name)
def test_an_impossible_value_is_one_sentence_before_anything_is_loaded(monkeypatch, capsys, path):
    def loaded(*_):
        raise AssertionError("a process was joined, and torch imported")

    monkeypatch.setattr("inlay.cli.recipe._join_processes", loaded)
    (defaults,) = captured(monkeypatch, path)
    names = {field.name for each in defaults for field in fields(each)}
    tried = [(name, value) for name, values in IMPOSSIBLE.items() if name in names for value in values]
    for name, value in tried:
        with pytest.raises(SystemExit) as status:
            run(monkeypatch, path.name, f"--{name}", value)
        out, err = capsys.readouterr()
        assert status.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"error: {name} must be ") and "got " in err
    assert tried or path.stem in ("predict", "generate")


def captured(monkeypatch, path):
    """The dataclasses that a recipe hands to run_recipe."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr("inlay.cli.recipe.run_recipe", lambda main, *defaults: found.append(defaults))
        runpy.run_path(str(path), run_name="__main__")
    return found


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: p.name)
def test_sister_recipes_have_the_same_options(monkeypatch, path):
    (defaults,) = captured(monkeypatch, path)
    task = VolumeTask if path.stem == "spatial_sam" else FAMILIES[path.stem.rpartition("_")[2]]
    assert isinstance(defaults[1], task)
    assert isinstance(defaults[2], TrainConfig) and defaults[2].output_dir == f"runs/{path.stem}"


def test_an_option_for_a_base_in_few_bits_is_refused_where_its_weights_are_trained(monkeypatch, capsys, tmp_path):
    for name in ("partial_vit.py", "partial_gpt2.py", "partial_sam.py"):
        with pytest.raises(SystemExit):
            run(monkeypatch, name, "--output_dir", tmp_path / "run", "--quantize", "8bit")
        assert "error: weights in 8 or 4 bits cannot be trained" in capsys.readouterr().err


def test_labels_are_smoothed_and_the_memory_is_said_before_training(monkeypatch, capsys, two_tasks, tmp_path):
    arguments = ["--dataset", two_tasks[0], "--output_dir", tmp_path / "run", "--epochs", 1, "--workers", 0]
    run(
        monkeypatch,
        "partial_vit.py",
        *arguments,
        "--label_smoothing",
        0.2,
        "--augment",
        "none",
        "--cache_frozen",
        "memory",
    )
    out = capsys.readouterr().out
    assert out.startswith("memory: base ") and "(batch 32)" in out and "cache_frozen stays off" not in out
    file = read_adapter(tmp_path / "run" / "adapter")
    assert file.metrics["training"]["label_smoothing"] == 0.2 and load_adapter(file.folder).deviation < 1e-4


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_keep_their_shape(path):
    text = path.read_text()
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    most = 80 if path in ADAPTERS else 150 if path in PUBLIC else 300  # what made the embedded bases makes several
    assert 40 <= len(text.splitlines()) <= most
    assert not any(module and module.startswith("recipes") for module in imported), "recipes do not import each other"
    if path in PUBLIC:
        assert not any(module.startswith("inlay.") for module in imported), "recipes import public names only"
    if "save_adapter(" in text:
        (main,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "main")
        assert ast.unparse(main.returns) == "Path" and isinstance(main.body[-1], ast.Return), "for --push_to"
    assert "    # 1. " in text and ast.unparse(ast.parse(text).body[-1].body[-1]).startswith("run_recipe(main")
    if path in ADAPTERS:
        steps = re.findall(r"^    # (\d)\. ", text, re.MULTILINE)
        assert steps == list("12345")
