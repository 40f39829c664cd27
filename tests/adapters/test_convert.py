"""Imported adapters compute what they computed: for each, ΔW as its own program writes it."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from inlay import import_adapter, load_adapter, load_base
from inlay.adapters.file import CONFIG, WEIGHTS, read_adapter
from inlay.cli import app as cli
from inlay.errors import InlayError
from places import SHARED

FILES = SHARED / "lora_checkpoints"
REAL = pytest.mark.skipif(not FILES.is_dir(), reason="the real files are not here")


def old_names(key):
    """What transformers 4 called a ViT's layers."""
    key = key.replace("vit.layers.", "vit.encoder.layer.")
    for part, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        key = key.replace(f".attention.{part}", f".attention.attention.{old}")
    key = key.replace(".attention.o_proj", ".attention.output.dense")
    return key.replace(".mlp.fc1", ".intermediate.dense").replace(".mlp.fc2", ".output.dense")


@pytest.fixture
def older(zoo, plain):
    """The saved adapter as plain peft and transformers 4 would have saved it."""

    def older(**settings):
        def change(config):
            config["target_modules"] = ["query", "key", "value", "output.dense", "intermediate.dense"]
            config.update(settings)

        plain(zoo, change)
        save_file({old_names(key): value for key, value in load_file(zoo / WEIGHTS).items()}, zoo / WEIGHTS)
        return zoo

    return older


def test_names_of_transformers_4(older, original, outputs, tmp_path, five):
    source = older()
    with pytest.raises(InlayError, match=r"does not fit"):
        load_adapter(source, five)
    made = import_adapter(source, tmp_path / "new")
    assert made.renamed == 48 and made.layers == 24 and made.checked == "its base's weights"
    loaded = load_adapter(tmp_path / "new")
    assert loaded.verified and loaded.labels == [f"LABEL_{i}" for i in range(5)]
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=0)


def test_patterns_follow_the_names(make, processor, outputs, older, zoo, tmp_path):
    from inlay import save_adapter

    model = make(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\.attention\.v_proj": 32})
    shutil.rmtree(zoo)
    save_adapter(model, zoo, processor=processor)
    source = older(rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\.attention\.attention\.value": 32})
    import_adapter(source, tmp_path / "new")
    torch.testing.assert_close(outputs(load_adapter(tmp_path / "new").model), outputs(model), rtol=0, atol=0)


def test_an_adapter_that_fits_gets_a_record(zoo, plain, original, outputs, tmp_path):
    made = import_adapter(plain(zoo), tmp_path / "new")
    assert made.renamed == 0 and made.form == "peft"
    loaded = load_adapter(tmp_path / "new")
    assert loaded.verified
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=0)


def delta(model, name):
    return model.base_model.model.get_submodule(name).get_delta_weight("default")


def tiny_base(kind, config, folder, **names):
    """A folder with a config alone, and the model."""
    config.architectures = [kind]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@REAL
def test_loralib_of_roberta(tmp_path):
    """ΔW = alpha / r · B·A, for queries and values of 12 blocks, and the classifier as it is."""
    config = transformers.RobertaConfig(vocab_size=20, intermediate_size=8, max_position_embeddings=20, num_labels=3)
    model = tiny_base("RobertaForSequenceClassification", config, tmp_path / "base")
    source = FILES / "roberta_base_lora_mnli.bin"
    for given, lacks in (({}, "the name of its base: --base; alpha"), ({"base": "a/b"}, "lacks alpha")):
        with pytest.raises(InlayError, match=f"is a LoRA of loralib, which .*{lacks}"):
            import_adapter(source, tmp_path / "new", **given)
    made = import_adapter(source, tmp_path / "new", base=str(tmp_path / "base"), alpha=16)
    assert (made.form, made.layers, made.checked) == ("loralib", 24, "its base's structure")
    adapted = PeftModel.from_pretrained(model, tmp_path / "new")
    tensors = torch.load(source, weights_only=True, map_location="cpu")
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    assert len(names) == 24
    for name in names:
        wanted = 16 / 8 * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        torch.testing.assert_close(delta(adapted, name), wanted, rtol=1e-6, atol=1e-7)
    head = adapted.base_model.model.classifier.modules_to_save["default"].state_dict()
    assert all(torch.equal(head[key], tensors[f"classifier.{key}"]) for key in head) and len(head) == 4
    assert read_adapter(tmp_path / "new").config["task_type"] == "SEQ_CLS"
    made = import_adapter(source, tmp_path / "other", base="someone/roberta", alpha=16)
    assert made.checked == "nothing: its base is not at hand"
    assert json.loads((tmp_path / "other" / CONFIG).read_text())["base_model_name_or_path"] == "someone/roberta"


@pytest.mark.parametrize("fused", [("q", "v"), ("q", "k", "v"), ("k",)])
def test_loralib_of_fused_layers(fused, tmp_path):
    """Part g of MergedLinear adds alpha / r · B_g·A_g to its own rows of q, k, v, and nothing to the others."""
    r, alpha, d = 3, 12.0, load_base("builtin:gpt2-tiny").config.n_embd
    generator = torch.Generator().manual_seed(1)
    k, tensors = len(fused), {}
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.c_attn.lora_A"] = torch.randn(k * r, d, generator=generator)
        tensors[f"transformer.h.{i}.attn.c_attn.lora_B"] = torch.randn(k * d, r, generator=generator)
    torch.save(tensors, tmp_path / "gpt2.pt")
    with pytest.raises(InlayError, match=f"of which {k} parts of {d} rows are adapted.* give --fused"):
        import_adapter(tmp_path / "gpt2.pt", tmp_path / "new", base="builtin:gpt2-tiny", alpha=alpha)
    import_adapter(tmp_path / "gpt2.pt", tmp_path / "new", base="builtin:gpt2-tiny", alpha=alpha, fused=fused)
    loaded = load_adapter(tmp_path / "new")
    assert loaded.verified
    for i in range(2):
        a, b = (tensors[f"transformer.h.{i}.attn.c_attn.lora_{x}"] for x in "AB")
        wanted = torch.zeros(3, d, d)
        for g, part in enumerate(fused):
            wanted["qkv".index(part)] = alpha / r * b[g * d : (g + 1) * d] @ a[g * r : (g + 1) * r]
        found = delta(loaded.model, f"transformer.h.{i}.attn.c_attn").T  # Conv1D: (d_in, d_out)
        torch.testing.assert_close(found, wanted.reshape(3 * d, d), rtol=1e-5, atol=1e-5)


@REAL
def test_stable_diffusions_text_encoder(tmp_path):
    """With CLIP as base the part of the text encoder by itself: layer number 4 i + j is k, v, q or out of block i."""
    config = transformers.CLIPTextConfig(vocab_size=20, hidden_size=768, num_hidden_layers=12, intermediate_size=8)
    model = tiny_base("CLIPTextModel", config, tmp_path / "base")
    source = FILES / "lora_disney.safetensors"
    made = import_adapter(source, tmp_path / "new", base=str(tmp_path / "base"))
    assert made.form == "cloneofsimo" and made.layers == 48
    assert made.left_out == [
        "288 tensors of the UNet (they take the pipeline as base)",
        "2 other tensors (<s1>, <s2>)",
    ]
    adapted, tensors = PeftModel.from_pretrained(model, tmp_path / "new"), load_file(source)
    for number in range(48):
        name = f"encoder.layers.{number // 4}.self_attn.{('k_proj', 'v_proj', 'q_proj', 'out_proj')[number % 4]}"
        wanted = tensors[f"text_encoder:{number}:up"] @ tensors[f"text_encoder:{number}:down"]
        torch.testing.assert_close(delta(adapted, name), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_other_forms_of_a_text_encoder(form, tmp_path):
    """ΔW = alpha / r · up·down, with kohya's alpha from the file."""
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
    )
    model = tiny_base("CLIPTextModel", config, tmp_path / "base")
    down, up = torch.randn(4, 16), torch.randn(32, 4)
    layer, alpha = "text_model.encoder.layers.1.mlp.fc1", 4.0
    if form == "kohya":
        name, alpha = f"lora_te_{layer.replace('.', '_')}", 2.0
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    else:
        down_name, up_name = {"peft": ("lora_A", "lora_B")}.get(
            form, ("lora_linear_layer.down", "lora_linear_layer.up")
        )
        tensors = {f"text_encoder.{layer}.{down_name}.weight": down, f"text_encoder.{layer}.{up_name}.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    given = {} if form == "kohya" else {"alpha": alpha}
    made = import_adapter(tmp_path / "x.safetensors", tmp_path / "new", base=str(tmp_path / "base"), **given)
    assert made.left_out == [] and made.renamed == 2
    adapted = PeftModel.from_pretrained(model, tmp_path / "new")
    torch.testing.assert_close(delta(adapted, "encoder.layers.1.mlp.fc1"), alpha / 4 * up @ down)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_what_is_refused(tmp_path, zoo, plain):
    def refused(source, message, **settings):
        with pytest.raises(InlayError, match=message):
            import_adapter(source, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    def saved(tensors, name="x.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    gpt2 = {"base": "builtin:gpt2-tiny", "alpha": 8}
    torch.save({"a.lora_A": Bomb()}, tmp_path / "bomb.bin")
    refused(tmp_path / "bomb.bin", r"\(it holds more than tensors\), and inlay runs no code that a pickle names")
    (tmp_path / "text.bin").write_text("hello")
    refused(tmp_path / "text.bin", r"cannot be read .*\(it is damaged or of another kind\)")
    torch.save([1, 2], tmp_path / "list.bin")
    refused(tmp_path / "list.bin", "holds no table of tensors")
    refused(tmp_path / "nowhere.bin", "does not exist|no file at")
    refused(saved({"weight": torch.ones(1)}), r"has no LoRA that inlay knows \(its keys: weight\)")
    pair = {"h.lora_A": torch.ones(2, 4), "h.lora_B": torch.ones(4, 2)}
    refused(saved(pair), "adapts 1 layers that GPT2LMHeadModel does not have", **gpt2)
    refused(saved({"h.lora_A": torch.ones(2, 4)}), "does not hold two matrices, or two kernels, for h", **gpt2)
    refused(saved({**pair, "h.lora_A": torch.full((2, 4), float("nan"))}), "holds NaN or Inf", **gpt2)
    layer = "transformer.h.0.mlp.c_fc"
    refused(saved({f"{layer}.lora_A": torch.ones(2, 5), f"{layer}.lora_B": torch.ones(9, 2)}), "does not fit", **gpt2)
    plain(zoo, lambda c: c.update(base_model_name_or_path=None))
    refused(zoo, "names no base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InlayError, match="exists; give a new folder"):
        import_adapter(zoo, tmp_path / "full")


def test_the_command(older, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inlay", "import", str(older()), "-o", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as status:
        cli.main()
    out = capsys.readouterr().out
    assert not status.value.code and "under names of an older transformers, 24 layers, 48 tensors renamed" in out
    assert out.splitlines()[-1] == "compared with: its base's weights" and load_adapter(tmp_path / "new").verified
