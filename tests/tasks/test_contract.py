"""The contract that every task passes: one row in TASKS, one row here, and a task has these tests."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import Subset
from transformers import BertConfig, BertForMaskedLM

from command import run
from diffusion_models import write_pipeline
from host_reads import watch_steps
from inlay import (
    Bank,
    ImageTask,
    InlayError,
    MaskTask,
    SequenceTask,
    SpatialAdapterConfig,
    TextTask,
    TextToImageTask,
    TrainConfig,
    VolumeTask,
    combine,
    evaluate,
    fit,
    head_modules,
    load_adapter,
    load_base,
    merge,
    read_adapter,
    sam_targets,
    save_adapter,
)
from inlay.adapters import golden
from inlay.adapters.task import find_task_of_file
from inlay.tasks import TASKS, find_task
from inlay.tasks.base import load_skeleton
from sam2_models import write_sam2


@dataclass
class Row:
    """What one task is tested with.

    Attributes:
        options: Its dataclass, with its smallest base and data.
        inputs: Of `inlay predict`; PICTURE and OUT stand for files.
        foreign: An option of another task.
        merges: What is said where it does not merge.
        banks: What is said where a bank does not take it.
        heads: What becomes of two heads where adapters are added.
    """

    options: Any
    inputs: list[str]
    foreign: list[str]
    merges: str = ""
    banks: str = ""
    heads: str = "auto"


ROWS = {
    "image-classification": Row(ImageTask(), ["PICTURE"], ["--beams", "5"]),
    "text-generation": Row(TextTask(), ["name[Zizzi], food[Thai]"], ["--top", "1"]),
    "mask-generation": Row(MaskTask(), ["PICTURE", "--point", "20,20", "--overlay", "OUT"], ["--beams", "5"]),
    "mask-generation SAM 2": Row(None, ["PICTURE", "--point", "20,20", "--overlay", "OUT"], ["--beams", "5"]),
    "volume-segmentation": Row(
        VolumeTask(), [], ["--beams", "5"], merges="makes a model for scans", banks="a bank holds", heads="one"
    ),
    "text-classification": Row(SequenceTask(), ["It welcomes families.", "It is cheap."], ["--beams", "5"]),
    "text-to-image": Row(None, ["a dog", "--steps", "2", "--sheet", "OUT"], ["--beams", "5"]),
}


@pytest.fixture(scope="module", autouse=True)
def tiny_bases(tmp_path_factory):
    """A SAM 2, and a pipeline with four images of a subject; the embedded ones take longer."""
    sam2 = write_sam2(tmp_path_factory.mktemp("sam2") / "base")
    ROWS["mask-generation SAM 2"].options = MaskTask(model=str(sam2))
    folder = tmp_path_factory.mktemp("painter")
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 90, 120)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("sks")
    base = write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")
    ROWS["text-to-image"].options = TextToImageTask(model=str(base), dataset=str(folder))


EVERY = pytest.mark.parametrize("name", ROWS)


def task_of(name):
    """A row is named after its task, with the base behind it where a task has a second row."""
    return find_task(name.partition(" ")[0])


@dataclass
class Trained:
    """An adapter of a task, trained for two steps and saved."""

    folder: Any
    data: Any
    output: torch.Tensor
    reads: list[tuple[str, ...]]


_TRAINED: dict[str, Trained] = {}


def batch_of(row, data):
    return {key: value for key, value in data.example().items() if isinstance(value, torch.Tensor)}


def answer(name, model, processor):
    """What a model makes of the golden input."""
    return torch.tensor(golden.compute_output(model, processor, task_of(name)))


def made(name, tmp_path_factory):
    """Trained once for all tests of the file."""
    if name in _TRAINED:
        return _TRAINED[name]
    options, folder = ROWS[name].options, tmp_path_factory.mktemp(name) / "one"
    data = options.load(0)
    model = options.base(data)
    task = task_of(name)
    if task.name == "volume-segmentation":
        config = SpatialAdapterConfig.fitted(model, data.source.labels, options.crop, data.processor.spacing_mm, 4)
    elif task.name == "mask-generation":
        config = LoraConfig(r=2, target_modules=sam_targets(model, "linear", "encoder"))
    else:
        head = head_modules(model) if task.classifies else None
        attention = {"text-to-image": ["to_q", "to_v"]}.get(name, ["q_proj", "v_proj"])
        attention = ["c_attn"] if "gpt2" in options.model else attention
        config = LoraConfig(r=2, target_modules=attention, modules_to_save=head)
    model = get_peft_model(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train = TrainConfig(output_dir=str(folder.parent / "run"), epochs=1, batch_size=2, workers=0)
    few = Subset(data.train, range(4))
    with watch_steps() as reads:
        result = fit(model, few, None, train, collate=data.collate, loss=data.loss)
    assert result.steps == 2
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert moved and all("lora" in n or "modules_to_save" in n or "spatial" in n or "default" in n for n in moved)
    save_adapter(model, folder, processor=data.processor, metrics={"dataset": data.source.name})
    _TRAINED[name] = Trained(folder, data, answer(name, model, data.processor), reads)
    return _TRAINED[name]


def test_every_task_has_a_row():
    assert {task_of(name).name for name in ROWS} == set(TASKS)


@EVERY
def test_no_step_reads_from_the_device(name, tmp_path_factory):
    assert made(name, tmp_path_factory).reads == []


@EVERY
def test_saved_and_loaded_it_computes_the_same(name, tmp_path_factory):
    trained = made(name, tmp_path_factory)
    loaded, task = load_adapter(trained.folder), task_of(name)
    assert loaded.task.name == task.name == read_adapter(trained.folder).record["task"]
    assert loaded.verified and loaded.deviation < 1e-3
    found = answer(name, loaded.model, loaded.processor)
    assert found == pytest.approx(trained.output, rel=1e-3, abs=1e-3)
    assert task.takes_processor(loaded.processor)
    heading, *said = task.describe_inputs(loaded.file.record) or ["none"]
    assert "#" not in heading and all(said)
    if task.classifies:
        assert tuple(loaded.labels) == tuple(trained.data.source.labels)


@EVERY
def test_the_golden_output_finds_another_head_or_adapter(name, tmp_path_factory):
    trained = made(name, tmp_path_factory)
    model = load_adapter(trained.folder).model
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "default" in key:
                parameter.add_(0.5)
    found = answer(name, model, trained.data.processor)
    assert golden.measure_deviation(trained.output.tolist(), found.tolist()) > golden.TOLERANCE["float32"]


@EVERY
def test_predict_through_the_command_line(name, tmp_path_factory, tmp_path, capsys, monkeypatch):
    row = ROWS[name]
    if not row.inputs:
        pytest.skip("tests/tasks/volumes segments scans through the command")
    folder = made(name, tmp_path_factory).folder
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "p.png")
    places = {"PICTURE": str(tmp_path / "p.png"), "OUT": str(tmp_path / "out.png")}
    status, out, err = run(capsys, monkeypatch, "predict", folder, *[places.get(word, word) for word in row.inputs])
    assert status == 0 and out.strip(), err


@EVERY
@pytest.mark.parametrize("use", ["predict", "evaluate"])
def test_inputs_go_to_the_device_of_the_model(name, use, tmp_path_factory, tmp_path):
    """On torch's meta device all is computed, if all of it is there; only reading the result is not possible."""
    row, loaded = ROWS[name], load_adapter(made(name, tmp_path_factory).folder)
    loaded.model.to("meta")
    reading = r"out of meta tensor|item\(\) cannot be called on meta|register_meta function for torch.nonzero"
    unread = pytest.raises((NotImplementedError, RuntimeError), match=reading)
    if use == "evaluate":
        if name == "text-to-image":
            pytest.skip("its images are compared by an encoder, which is loaded on a device that computes")
        with unread:
            evaluate(loaded, row.options.dataset, limit=2, resamples=9)
        return
    if not row.inputs:
        pytest.skip("tests/tasks/volumes segments scans on the meta device")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "p.png")
    options = {"point": ["20,20"]} if "--point" in row.inputs else {}
    options |= {"sheet": tmp_path / "out.png", "steps": 2} if "--sheet" in row.inputs else {}
    texts = list(takewhile(lambda word: not word.startswith("--"), row.inputs))
    inputs = [str(tmp_path / "p.png")] if "PICTURE" in row.inputs else texts
    task = task_of(name)
    respond = task.prepare(inputs, {**{key: option.default for key, option in task.options.items()}, **options})
    with unread:
        respond(loaded)


@EVERY
def test_options_of_another_task_are_refused_in_one_sentence(name, tmp_path_factory, capsys, monkeypatch):
    folder = made(name, tmp_path_factory).folder
    status, _, err = run(capsys, monkeypatch, "predict", folder, "x", *ROWS[name].foreign)
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in err
    assert f"{ROWS[name].foreign[0]} is an option for " in said and f"is for {task_of(name).name}" in said


@EVERY
def test_an_adapter_of_another_task_is_refused_in_one_sentence(name, tmp_path_factory, tmp_path):
    from inlay import classify_texts, predict

    loaded = load_adapter(made(name, tmp_path_factory).folder)
    task = task_of(name).name
    for function, own in ((predict, "image-classification"), (classify_texts, "text-classification")):
        if own != task:
            with pytest.raises(InlayError, match=rf"is for {task}, not for {own}; use {loaded.task.function}\.$"):
                function(loaded, ["x"])


@EVERY
def test_it_is_scored_by_its_own_words(name, tmp_path_factory):
    found = evaluate(made(name, tmp_path_factory).folder, ROWS[name].options.dataset, limit=2, resamples=9)
    assert (found.task, found.count) == (task_of(name).name, 2) and found.scores and len(found.rows) >= 2
    assert all(np.isfinite(score.value) for score in found.scores.values())
    assert found.base or any("base" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "group", "unit"),
    [
        ("text-generation", "completion", "completion group"),
        ("mask-generation", r"scene \d", "group"),
        ("volume-segmentation", r"body_\d\d", "group"),
        ("text-classification", "label", "label group"),
    ],
)
def test_groups_of_its_training_are_resampled(name, group, unit, tmp_path_factory):
    """tests/tasks/test_groups.py does so for images, whose embedded data has no groups."""
    loaded, data = load_adapter(made(name, tmp_path_factory).folder), ROWS[name].options.dataset
    noted = {"dataset": data, "training": {"seed": 0, "group": group}, "decoding": {"max_new_tokens": 2}}
    loaded.file.metrics.update(noted)
    found = evaluate(loaded, data, limit=2, compare=False, resamples=2)
    assert found.unit == unit and 1 <= found.count <= 2
    assert any(f"The unit that was resampled is the {unit}: {found.count} of them hold 2" in n for n in found.notes)


@EVERY
def test_two_add(name, tmp_path_factory, tmp_path):
    folder = made(name, tmp_path_factory).folder
    out = tmp_path / "sum"
    combine({folder: 0.5, _copied(folder, tmp_path / "two"): 0.5}, out=out, heads=ROWS[name].heads)
    loaded = load_adapter(out)
    found = answer(name, loaded.model, loaded.processor)
    assert found == pytest.approx(made(name, tmp_path_factory).output, rel=1e-2, abs=1e-2)


def _copied(folder, to):
    import shutil

    return shutil.copytree(folder, to)


@EVERY
def test_it_merges_or_says_why_not(name, tmp_path_factory, tmp_path):
    folder = made(name, tmp_path_factory).folder
    if ROWS[name].merges:
        with pytest.raises(InlayError, match=ROWS[name].merges):
            merge(folder, tmp_path / "merged")
        return
    merged = merge(folder, tmp_path / "merged")
    assert merged.error < 0.05
    plain = load_base(merged.folder)
    task = task_of(name)
    assert task.takes_base(plain.config)
    found = answer(name, plain, task.load_processor(str(merged.folder), None))
    if task.name != "text-generation":  # its processor is no part of a plain model
        assert found == pytest.approx(made(name, tmp_path_factory).output, rel=1e-2, abs=1e-2)


@EVERY
def test_a_bank_takes_it_or_says_why_not(name, tmp_path_factory):
    trained = made(name, tmp_path_factory)
    loaded = load_adapter(trained.folder)
    inputs = batch_of(ROWS[name], trained.data)
    with torch.no_grad():
        expected = loaded.model(**inputs)
    base = ROWS[name].options.base(trained.data)
    if ROWS[name].banks:
        with pytest.raises(InlayError, match=ROWS[name].banks):
            Bank(base, {"one": trained.folder})
        return
    found = Bank(base, {"one": trained.folder})(inputs, ["one"])
    key = next(key for key in ("logits", "pred_masks", "prediction") if key in expected)
    assert torch.allclose(found[key], expected[key], atol=1e-4)


@EVERY
def test_it_is_planned_without_weights(name, tmp_path_factory):
    row, task = ROWS[name], task_of(name)
    labels = ["a", "b"] if task.classifies else None
    base = load_skeleton(row.options.model, task=task.name, labels=labels)
    batch, _ = task.planned_batch(base, 2, 16, 0)
    assert batch and all(len(value) == 2 for value in batch.values())


def test_what_plain_peft_saved_is_for_what_it_says(tmp_path):
    """By its task_type where it has one, or else by its base."""
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(**size, vocab_size=9)).save_pretrained(tmp_path / "bert")
    for base, kind, wanted in (
        ("builtin:gpt2-tiny", None, "text-generation"),
        ("builtin:gpt2-tiny", "SEQ_CLS", "text-classification"),
        (str(tmp_path / "bert"), None, "text-classification"),
        (str(tmp_path / "bert"), "SEQ_CLS", "text-classification"),
        ("builtin:vit-tiny", None, "image-classification"),
    ):
        task = "text-classification" if wanted == "text-classification" else None
        labels = ["a", "b"] if find_task(wanted).classifies else None
        model = load_base(base, task=task, labels=labels)
        targets = {"builtin:gpt2-tiny": ["c_attn"], "builtin:vit-tiny": ["q_proj"]}.get(base, ["query"])
        model = get_peft_model(model, LoraConfig(r=1, target_modules=targets, task_type=kind))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        model.peft_config["default"].base_model_name_or_path = base
        assert find_task_of_file(read_adapter(tmp_path / "adapter")).name == wanted
