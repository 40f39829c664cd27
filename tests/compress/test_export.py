"""Exported models answer as the models of transformers that they are of, and say what is wrong with their folders.

All that needs torch's exporter or ONNX Runtime is in this file: both take seconds to import, and so does each export.
"""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    SamConfig,
    SamModel,
    SamVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from command import run
from inlay import (
    BottleneckConfig,
    Decoding,
    InlayError,
    classify_texts,
    evaluate,
    export,
    generate,
    load_base,
    load_exported,
    load_images,
    load_processor,
    predict,
    predict_masks,
    quantize,
    read_adapter,
    save_adapter,
)
from inlay.compress import graph as graphs
from inlay.compress import quantize as quantizing
from inlay.compress.exported import RECORD, hash_file, is_exported
from inlay.compress.graph import Graph, measure_error
from inlay.compress.int8 import INT8_MODES, has_vnni, prepare_graph, quantize_graph
from inlay.compress.probe import Row, Speed
from inlay.compress.quantize import FLOAT32, TORCH, judge_modes
from inlay.compress.source import load_source
from inlay.errors import BadInput, ComputationFailed, DamagedFile, Unsupported
from inlay.tasks.evaluation import Request
from places import ROOT

pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'inlay[export]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'inlay[export]'")

DIGITS = {i: str(i) for i in range(10)}
LABELS = {"id2label": DIGITS, "label2id": {label: i for i, label in DIGITS.items()}}
IMAGE = {"image_size": 32, "num_channels": 3, "initializer_range": 0.3, **LABELS}
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def save(model, folder, tokenizer="gpt2-tiny"):
    model.eval().save_pretrained(folder)
    if not hasattr(model.config, "image_size") and not hasattr(model.config, "vision_config"):
        for path in (ROOT / "src/inlay/builtin" / tokenizer).glob("tokenizer*"):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = save(ViTForImageClassification(ViTConfig(**SIZE, **IMAGE, patch_size=8)), tmp_path_factory.mktemp("vit"))
    load_processor("builtin:vit-tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "digits"
    export(vit, folder)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


def edit(folder, **changes):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **changes}))


def pixels(rows, side=32):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(rows))


# ---- what is exported answers as before


def test_a_classifier_answers_as_the_model_for_any_number_of_rows(vit, exported):
    plain, loaded = AutoModelForImageClassification.from_pretrained(vit), load_exported(exported)
    assert loaded.deviation < 1e-5 and loaded.labels == list(DIGITS.values()) and loaded.mode == "float32"
    for rows in (1, 2, 5):
        batch = {"pixel_values": pixels(rows)}
        with torch.no_grad():
            assert torch.allclose(loaded.model(**batch).logits, plain(**batch).logits, atol=2e-5)


def test_predict_and_evaluate_take_it_as_they_take_a_model(vit, exported, pictures):
    loaded, source = load_exported(exported), load_source(vit)
    files = sorted(map(str, pictures.iterdir()))
    assert [p.labels for p in predict(loaded, files)] == [p.labels for p in predict(source, files)]
    found = evaluate(loaded, "builtin:digits", limit=20, resamples=9)
    wanted = source.task.evaluate(source, "builtin:digits", Request(limit=20, compare=False, resamples=9))
    assert [row["predicted"] for row in found.rows] == [row["predicted"] for row in wanted.rows] and found.base is None
    assert "the adapter" not in str(found)
    with pytest.raises(BadInput, match="'digits' is none; leave write out"):
        evaluate(loaded, "builtin:digits", limit=20, write=True)
    with pytest.raises(BadInput, match="'digits' has no group of labels 'even', it has no groups; leave group out"):
        predict(loaded, files, group="even")


def test_the_folder_says_what_it_is(vit, exported):
    record = json.loads((exported / RECORD).read_text())
    assert record["task"] == "image-classification" and record["source"] == {"model": str(vit)}
    assert record["preprocessing"]["image_processor_type"] == "ViTImageProcessor" and len(record["golden"]) == 10
    assert record["opset"] >= 18 and {"onnx", "onnxruntime", "torch"} <= set(record["versions"])
    card = (exported / "README.md").read_text()
    assert "## Labels\n\n0 = 0, 1 = 1" in card and "resized to 32 x 32 pixels" in card
    assert str(vit) not in card and str(ROOT).encode() not in (exported / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("config", "merged"),
    [
        (LoraConfig(r=3, target_modules=["fc1", "q_proj"], modules_to_save=["classifier"]), True),
        (BottleneckConfig(width=3, modules_to_save=["classifier"]), False),
    ],
    ids=["merged", "in the graph"],
)
def test_an_adapter_is_merged_where_it_can_be_and_else_part_of_the_graph(vit, config, merged, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load_base(vit), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    metrics = {"dataset": "builtin:digits", "training": {"seed": 3}, "validation": {"accuracy": 0.5}}
    save_adapter(model, tmp_path / "adapter", processor=load_processor("builtin:vit-tiny"), metrics=metrics)
    made = export(tmp_path / "adapter", tmp_path / "out")
    assert "adapter as an ONNX graph" in str(made) and made.bytes == (tmp_path / "out/model.onnx").stat().st_size
    loaded, batch = load_exported(tmp_path / "out"), {"pixel_values": pixels(3)}
    with torch.no_grad():
        assert torch.allclose(loaded.model(**batch).logits, model.eval()(**batch).logits, atol=1e-4)
    assert loaded.metrics == {"dataset": "builtin:digits", "training": {"seed": 3}}
    source = loaded.file.record["source"]
    assert source["merged"] == merged and source["base"] == str(vit)
    assert source["digest"] == read_adapter(tmp_path / "adapter").digest


def test_a_language_model_writes_the_same_texts(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=2048, initializer_range=0.3)
    folder = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    export(folder, tmp_path / "out")
    loaded, source = load_exported(tmp_path / "out"), load_source(folder)
    prompts = ["a", "name[Blue Spice], area[riverside]"]  # of two lengths: the first one is padded on the left
    for decoding in (Decoding(max_new_tokens=8), Decoding(max_new_tokens=8, beams=3), Decoding(8, temperature=0.7)):
        wanted = generate(source.model, source.processor, prompts, decoding)
        assert generate(loaded.model, loaded.processor, prompts, decoding) == wanted and wanted[0] != wanted[1]
    (tmp_path / "prepared").mkdir()
    (tmp_path / "int8").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where the quantiser would leave files
    prepared = prepare_graph(tmp_path / "out/model.onnx", tmp_path / "prepared")
    quantize_graph(prepared, INT8_MODES["int8-dynamic"], [], tmp_path / "int8", reduce_range=not has_vnni())
    assert not list((tmp_path / "here").iterdir())
    inputs = source.task.graph_inputs(source.model, source.processor)
    assert 0 < measure_error(source.model, Graph(tmp_path / "int8/model.onnx"), inputs, "logits") < 0.05


def test_a_classifier_of_texts_reads_any_length(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**SIZE, vocab_size=2048, max_position_embeddings=64, initializer_range=0.5, num_labels=3)
    folder = save(BertForSequenceClassification(config), tmp_path / "bert")
    export(folder, tmp_path / "out")
    loaded, source = load_exported(tmp_path / "out"), load_source(folder)
    texts = ["a", "a much longer text than the first one, and a second sentence"]
    for found, wanted in zip(classify_texts(loaded, texts), classify_texts(source, texts), strict=True):
        assert found.labels == wanted.labels and np.allclose(found.probabilities, wanted.probabilities, atol=1e-5)


def test_the_image_encoder_of_sam_is_a_graph_and_torch_answers_prompts(tmp_path):
    torch.manual_seed(0)
    base = SamConfig.from_pretrained(ROOT / "src/inlay/builtin/sam-tiny")
    vision = {**base.vision_config.to_dict(), "num_hidden_layers": 1, "global_attn_indexes": [0]}
    config = SamConfig(
        vision_config=SamVisionConfig(**{**vision, "initializer_range": 0.05}),
        prompt_encoder_config=base.prompt_encoder_config,
        mask_decoder_config=base.mask_decoder_config,
    )
    folder = save(SamModel(config), tmp_path / "sam")
    load_processor("builtin:sam-tiny").save_pretrained(folder)
    export(folder, tmp_path / "out")
    loaded, source = load_exported(tmp_path / "out"), load_source(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    for prompt in ({"points": [(40, 50)]}, {"boxes": [(10, 10, 50, 50), (20, 30, 70, 80)]}):
        found, wanted = predict_masks(loaded, image, **prompt), predict_masks(source, image, **prompt)
        assert np.array_equal(found.masks, wanted.masks) and np.allclose(found.scores, wanted.scores, atol=1e-5)
    with pytest.raises(Unsupported, match="mask-generation, whose answers are no classes"):
        quantize(folder, tmp_path / "int8", calibrate="builtin:scenes")


def test_a_combination_keeps_its_groups_of_labels(copied, pictures):
    edit(copied, groups={"even": {"zero": 0, "two": 2}, "odd": {"one": 1}})
    loaded, files = load_exported(copied), sorted(map(str, pictures.iterdir()))
    for found, whole in zip(predict(loaded, files, group="even"), predict(loaded, files, top=10), strict=True):
        of = dict(zip(whole.labels, whole.probabilities, strict=True))
        assert dict(zip(found.labels, found.probabilities, strict=True))["two"] == pytest.approx(
            of["2"] / (of["0"] + of["2"]), abs=1e-5
        )


# ---- what is wrong


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"format": 99}, Unsupported, "format 99, this inlay reads up to 1"),
        ({"labels": ["0", "1"]}, DamagedFile, "names 2 labels, but its model gives 10 logits"),
        ({"golden": [1.0] * 10}, ComputationFailed, "its golden output differs by"),
        ({"groups": {"even": {"two": 12}}}, DamagedFile, "no usable 'groups'"),
        ({"runtime": "pickle"}, DamagedFile, "no usable 'runtime'"),
        ({"task": "cooking"}, BadInput, "unknown task 'cooking'"),
        ({"files": {"../model.onnx": ""}}, DamagedFile, "has no file '../model.onnx'"),
        ({"files": {"more.onnx": ""}}, DamagedFile, "has no file 'more.onnx'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(copied, changes, kind, sentence):
    edit(copied, **changes)
    with pytest.raises(kind, match=sentence):
        load_exported(copied)


def test_damaged_files_are_refused(copied, exported, vit, digits_adapter):
    data = bytearray((copied / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.onnx").write_bytes(data)
    with pytest.raises(DamagedFile, match="its digest is another"):
        load_exported(copied)
    (copied / "model.onnx").write_bytes(b"no graph")
    edit(copied, files={"model.onnx": hash_file(copied / "model.onnx")})
    with pytest.raises(DamagedFile, match="ONNX Runtime cannot read"):
        load_exported(copied)
    (copied / RECORD).write_text("{")
    with pytest.raises(DamagedFile, match="not readable as JSON"):
        load_exported(copied)
    (copied / RECORD).write_text("[]")
    with pytest.raises(DamagedFile, match="no usable 'format'"):
        load_exported(copied)
    with pytest.raises(BadInput, match=r"has no export.json. Give the folder"):
        load_exported(vit)
    with pytest.raises(BadInput, match="it is an adapter: use load_adapter"):
        load_exported(digits_adapter)
    with pytest.raises(BadInput, match="is exported already"):
        export(exported, copied.parent / "again")


def test_what_cannot_be_exported_is_said_and_nothing_is_written(vit, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="unknown format 'tflite'"):
        export(vit, tmp_path / "out", format="tflite")
    with pytest.raises(BadInput, match="exists and is not an exported model"):
        export(vit, vit)
    with pytest.raises(BadInput, match="is a model and goes on no base"):
        export(vit, tmp_path / "out", base="builtin:vit-tiny")
    with pytest.raises(Unsupported, match="makes a model for scans of one for images"):
        export(ROOT / "adapters_hub/lesions-spatial-sam-tiny", tmp_path / "out")

    def branch(self, pixel_values, **options):  # control flow that depends on values
        return self.logits if pixel_values.sum() > 0 else None

    monkeypatch.setattr(ViTForImageClassification, "forward", branch)
    with pytest.raises(Unsupported, match="torch cannot export ViTForImageClassification as an ONNX graph"):
        export(vit, tmp_path / "out")
    for package, named in (("onnxruntime", "ONNX Runtime"), ("onnxscript", "onnxscript")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(Unsupported, match=rf"{named} is not installed; pip install 'inlay\[export\]'"):
                export(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def not_traced(exported, monkeypatch):
    """torch's exporter, which takes seconds, gives the graph of the small ViT that it has made before."""

    def save(path, external_data):
        shutil.copy(exported / "model.onnx", path)

    program = SimpleNamespace(save=save, model=SimpleNamespace(graph=SimpleNamespace(all_nodes=list)))
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: program)


@pytest.mark.usefixtures("not_traced")
def test_a_graph_that_computes_something_else_is_not_written(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "measure_error", lambda *arguments: 0.01)
    with pytest.raises(ComputationFailed, match=r"differs from the model by 1\.0e-02"):
        export(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- 8 bits


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_channels=3, **LABELS
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():  # labels that differ by image: activations of the size that a trained network has
        model.train()(pixel_values=pixels(64))
        model.classifier[1].weight.mul_(20)
    return save_images(model, tmp_path_factory.mktemp("resnet"))


def save_images(model, folder):
    model.eval().save_pretrained(folder)
    load_processor("builtin:vit-tiny").save_pretrained(folder)
    return folder


def speeds(**medians):
    """What a probe would have measured; the modes that are not named are slow."""

    def time_by_turns(models, inputs):
        named = {name.replace("_", "-"): value for name, value in medians.items()}
        return {name: Speed(9.0, 1.0, 10.0, named.get(name, 9.0), 40) for name in models}

    return time_by_turns


def test_the_fastest_mode_that_keeps_the_answers_is_written(convolutional, tmp_path, monkeypatch):
    fast = speeds(float32=5.0, int8_static=1.0, int8_dynamic=2.0)
    monkeypatch.setattr(quantizing, "time_by_turns", fast)
    monkeypatch.setattr(quantizing, "check_torch_mode", lambda name: None if name == "bfloat16" else missing())
    tables = []
    made = quantize(
        convolutional, tmp_path / "int8", calibrate="builtin:digits", examples=21, compare=64, max_drop=0.2,
        min_agreement=0.5, show=tables.append,
    )  # fmt: skip
    rows = {row["mode"]: row for row in made.probe["rows"]}
    assert set(rows) == {TORCH, FLOAT32, "int8-dynamic", "int8-static", "int8-static-percentile",
                         "int8-static-weights", "bfloat16"}  # fmt: skip
    assert rows[FLOAT32]["agreement"] == 1 and rows["int8-static"]["verdict"] == "chosen"
    assert rows["int8-dynamic"]["verdict"] == "pays" and rows["bfloat16"]["verdict"] == "not faster than float32"
    assert rows["int8-static"]["bytes"] < rows[FLOAT32]["bytes"] and made.probe["calibrated"] == 16
    assert "int8-static-percentile" in tables[0] and "chosen" in tables[0]
    loaded = load_exported(tmp_path / "int8")
    assert loaded.mode == "int8-static" and loaded.file.record["probe"] == made.probe
    assert "| int8-static |" in (tmp_path / "int8/README.md").read_text()
    # what the folder holds agrees with transformers' model as the probe says
    plain = AutoModelForImageClassification.from_pretrained(convolutional)
    source = load_source(convolutional)
    batches = quantizing.load_batches(source, "builtin:digits", 64, 0, held_out=True)
    values = torch.cat([batch["pixel_values"] for batch in batches])
    with torch.no_grad():
        equal = loaded.model(pixel_values=values).logits.argmax(-1) == plain(pixel_values=values).logits.argmax(-1)
    assert float(equal.float().mean()) == pytest.approx(rows["int8-static"]["agreement"], abs=1e-5)


def missing():
    raise Unsupported("not installed")


def test_calibration_and_judgement_see_different_images(vit):
    source = load_source(vit)
    used = [
        torch.cat([b["pixel_values"] for b in quantizing.load_batches(source, "builtin:digits", 64, 0, held_out=held)])
        for held in (False, True)
    ]
    assert not {image.numpy().tobytes() for image in used[0]} & {image.numpy().tobytes() for image in used[1]}
    held_out = {row["bytes"] for row in load_images("builtin:digits", seed=0).validation["image"]}
    assert len(used[1]) == 64 and len(held_out) >= 64


@pytest.mark.usefixtures("not_traced")
def test_a_mode_of_torch_is_a_model_of_transformers(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "time_by_turns", speeds(float32=5.0, bfloat16=1.0))
    made = quantize(
        vit, tmp_path / "bf16", calibrate="builtin:digits", mode="bfloat16", compare=32, max_drop=1, min_agreement=0
    )
    assert made.exported.opset is None and made.exported.mode == "bfloat16"
    loaded = load_exported(tmp_path / "bf16")
    plain = AutoModelForImageClassification.from_pretrained(vit, dtype=torch.bfloat16)
    batch = {"pixel_values": pixels(3).bfloat16()}
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, plain(**batch).logits)
    images = load_images("builtin:digits").validation.select(range(2))["image"]
    assert len(predict(loaded, [image["bytes"] for image in images])) == 2


@pytest.mark.usefixtures("not_traced")
def test_where_nothing_pays_nothing_is_written(vit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantizing, "time_by_turns", speeds(float32=1.0))
    status, out, err = run(
        capsys, monkeypatch, "quantize", vit, "--output", tmp_path / "out", "--calibrate", "builtin:digits",
        "--mode", "dynamic", "--compare", 16,
    )  # fmt: skip
    assert status == 2 and "int8-dynamic" in out and "agreement" in out
    assert "no mode pays for" in err and "int8-dynamic: not faster than float32" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def row(mode, latency, agreement=1.0, accuracy=0.9):
    return Row(mode, 9.0, 1.0, 10.0, latency, latency, 1.0, agreement, accuracy)


@pytest.mark.parametrize(
    ("rows", "chosen", "verdict"),
    [
        ([row("a", 3.0), row("b", 2.0)], "b", "chosen"),
        ([row("a", 3.0), row("b", 2.0, accuracy=0.88)], "a", "refused: accuracy drops by 0.0200"),
        ([row("a", 3.0), row("b", 2.0, agreement=0.83)], "a", "refused: 17.0% of the answers differ"),
        ([row("a", 3.0), row("b", 2.0, agreement=None, accuracy=None)], "a", "refused: far slower"),
        ([row("a", 5.0), row("b", 4.5)], None, "not faster than float32"),
    ],
)
def test_the_verdict_of_a_mode(rows, chosen, verdict):
    table = [row(TORCH, 8.0), row(FLOAT32, 4.0), *rows]
    found = judge_modes(table, 0.01, 0.95)
    assert (found and found.mode) == chosen and table[-1].verdict.startswith(verdict)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "int4"}, "unknown mode 'int4'; choose one of auto, dynamic, static"),
        ({"max_drop": 2}, "max_drop must be 0 to 1, got 2"),
        ({"min_agreement": -1}, "min_agreement must be 0 to 1, got -1"),
        ({"examples": 4}, "examples must be at least 8"),
        ({"calibrate": "builtin:shapes"}, "has labels that the adapter does not have"),
    ],
)
def test_a_wrong_argument_is_named(vit, tmp_path, options, sentence):
    with pytest.raises(InlayError, match=sentence):
        quantize(vit, tmp_path / "out", **{"calibrate": "builtin:digits", **options})


# ---- the command line


def test_the_verbs_take_an_exported_folder(exported, pictures, capsys, monkeypatch):
    assert is_exported(exported)
    status, out, _ = run(capsys, monkeypatch, "predict", exported, pictures, "--top", 1, "--json")
    assert status == 0 and len(json.loads(out)) == 5
    status, out, _ = run(capsys, monkeypatch, "evaluate", exported, "builtin:digits", "--limit", 10, "--json")
    assert status == 0 and json.loads(out)["count"] == 10
    for verb, *more in (("predict", pictures, "--merge"), ("evaluate", "builtin:digits", "--base", "builtin:vit-tiny")):
        status, out, err = run(capsys, monkeypatch, verb, exported, *more)
        assert status == 2 and out == "" and f"{exported} is a model" in err
        assert err.rstrip().endswith(f"leave {more[1]} out.")
