"""Weights by part of the base: the modules at its top, such as the UNet and the text encoder of a pipeline."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from combine.cases import LAYERS, off, updates, write_lora
from inlay import InlayError, combine, overlap
from inlay.cli import app as cli
from inlay.combine import RULES

PARTS = {"unet": 1.0, "text_encoder": 0.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """LoRA of a UNet and a text encoder, and of a UNet only."""
    folder = tmp_path_factory.mktemp("parts")
    only = {site: sizes for site, sizes in LAYERS.items() if site.startswith("unet")}
    return write_lora(folder / "dog", 3), write_lora(folder / "toy", 4, rank=2, layers=only)


def test_each_part_has_its_own_weight(pair, tmp_path):
    dog, toy = pair
    made = combine({dog: PARTS, toy: -2.0}, out=tmp_path / "out")
    first, second = map(updates, pair)
    wanted = {site: PARTS[site.split(".")[0]] * delta - 2 * second.get(site, 0) for site, delta in first.items()}
    assert off(updates(tmp_path / "out"), wanted) < 1e-6 and made.error == 0
    assert made.weights == {"dog": PARTS, "toy": {"unet": -2.0}}
    card = (tmp_path / "out/README.md").read_text()
    assert "| dog | unet 1, text_encoder 0.5 |" in card and "| toy | unet -2 |" in card
    of = json.loads((tmp_path / "out/metrics.json").read_text())["combined"]["of"]
    assert of == [{"name": "dog", "weight": PARTS}, {"name": "toy", "weight": {"unet": -2.0}}]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_in_each_part_the_weights_of_that_part(rule, pair, tmp_path):
    """As if the whole had been combined with them."""
    dog, toy = pair
    other = write_lora(tmp_path / "other", 5)
    combine({dog: PARTS, toy: 3.0, other: {"unet": -0.5, "text_encoder": 2.0}}, rule, out=tmp_path / "out")
    combine({dog: 1.0, toy: 3.0, other: -0.5}, rule, out=tmp_path / "unet")
    combine({dog: 0.5, other: 2.0}, rule, out=tmp_path / "text_encoder")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(found) == 2 * len(LAYERS)
    for part in PARTS:
        same = load_file(tmp_path / part / "adapter_model.safetensors")
        for key in (key for key in found if f".{part}." in key):
            assert torch.equal(found[key], same[key]), key


def test_an_average_divides_in_each_part(pair, tmp_path):
    dog, toy = pair
    made = combine({dog: {"unet": 1, "text_encoder": 4}, toy: 3}, "average", out=tmp_path / "out")
    assert made.weights == {"dog": {"unet": 0.25, "text_encoder": 1.0}, "toy": {"unet": 0.75}}
    with pytest.raises(InlayError, match=r"but \[0.0\] of text_encoder add up to 0; use add"):
        combine({dog: {"unet": 1, "text_encoder": 0}, toy: 3}, "average", out=tmp_path / "none")


def test_a_head_is_a_part(tmp_path):
    folders = []
    for name, seed in (("a", 3), ("b", 4)):
        head = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))

        def add_head(weights, head=head):
            weights["base_model.model.classifier.weight"] = head

        folder = write_lora(tmp_path / name, seed, layers={"vit.q_proj": ((6,), (8,))}, change=add_head)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["classifier"]}))
        folders.append(folder)
    a, b = folders
    weights = {a: {"vit": 0.5, "classifier": 3.0}, b: 1.0}
    combine(weights, heads="average", out=tmp_path / "out")
    heads = [load_file(f / "adapter_model.safetensors")["base_model.model.classifier.weight"] for f in (a, b)]
    found = load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.allclose(found, 0.75 * heads[0] + 0.25 * heads[1], atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        ({"unet": 1, "text_encoder": 1, "vae": 1}, "adapter 'dog' has no part 'vae'; its parts are text_encoder, unet"),
        ({"unet": 1}, "'dog' also changes text_encoder; give the weight there too"),
        ({}, "name no part of its base; give a number, or one for each part"),
        (
            {"unet": 1, "text_encoder": "half"},
            r"the weight of text_encoder in .*dog must be a finite number, not 'half'",
        ),
        ({"unet": float("nan"), "text_encoder": 1}, "the weight of unet in .* must be a finite number, not nan"),
        ("half", "the weight of .*dog must be a finite number, not 'half'"),
    ],
)
def test_weights_that_make_no_sense_are_one_sentence(weight, sentence, pair, tmp_path):
    with pytest.raises(InlayError, match=sentence):
        combine({pair[0]: weight}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_change_no_module_have_no_parts(tmp_path):
    folder = tmp_path / "prompt"
    folder.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.ones(2, 4)}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match="'prompt' changes no module of its base, so that it has no parts"):
        combine({folder: {"transformer": 1.0}}, out=tmp_path / "out")


def test_the_command_and_the_report(pair, tmp_path, capsys, monkeypatch):
    dog, toy = pair

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inlay", "combine", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            cli.main()
        return int(status.value.code or 0), *capsys.readouterr()

    status, out, _ = run(f"{dog}=unet:1,text_encoder:0.5", f"{toy}=2", "-o", tmp_path / "out")
    assert status == 0 and "dog: unet 1, text_encoder 0.5; toy: unet 2" in out
    assert off(updates(tmp_path / "out"), updates(combine({dog: PARTS, toy: 2}, out=tmp_path / "same").folder)) == 0
    report = str(overlap({dog: PARTS, toy: 2}))
    assert "dog x unet 1, text_encoder 0.5: the only one in 1 modules" in report and "2 modules in common" in report
    status, out, _ = run(f"{dog}=unet:1,text_encoder:0.5", f"{toy}=2")
    assert status == 0 and out.strip() == report
    run(f"{dog}=unet:1,text_encoder:0.5", f"{toy}=2", "--report", tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    for wrong, sentence in [
        ("unet:1,text_encoder", "must be ADAPTER=WEIGHT, such as runs/a=0.5, or with a weight for each part"),
        ("unet:x,text_encoder:1", "must be ADAPTER=WEIGHT"),
        ("unet:1:2", "must be ADAPTER=WEIGHT"),
        ("unet:1,unet:2", "one part is named twice in"),
        ("unet:1,vae:2", "has no part 'vae'"),
    ]:
        status, out, err = run(f"{dog}={wrong}", "-o", tmp_path / "none")
        assert status == 2 and out == "" and sentence in err and err.count("\n") == 1
