"""What takes the base: dense differences, and fitted weights; and the command."""

import json
import sys

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

from combine.cases import BASE, classifier
from inlay import (
    InlayError,
    SpatialAdapterConfig,
    TextProcessor,
    VolumeProcessor,
    combine,
    load_adapter,
    load_base,
    load_images,
    load_processor,
    load_tokenizer,
    load_volumes,
    save_adapter,
)
from inlay.bases.sites import head_modules, lora_targets
from inlay.cli import app as cli
from inlay.combine.examples import load_examples
from inlay.combine.fit import fit_weights
from methods.bases import randomise

GPT2, SAM = "builtin:gpt2-tiny", "builtin:sam-tiny"


def trained(folder, config, labels, seed):
    model = load_base(BASE, labels=labels)
    config.modules_to_save = head_modules(model)
    model = get_peft_model(model, config).eval()
    randomise(model, "default", seed)
    return save_adapter(model, folder, processor=load_processor(BASE))


def test_what_does_not_add_is_given_as_a_difference_of_weights(tmp_path):
    targets = lora_targets(load_base(BASE, labels=["x", "y"]), "attention")
    a = trained(tmp_path / "dora", LoraConfig(r=2, use_dora=True, target_modules=targets), ["cat", "dog"], 3)
    b = trained(tmp_path / "loha", LoHaConfig(r=2, target_modules=targets), ["emu", "fox"], 4)
    with pytest.raises(InlayError, match="use dense=True"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    made = combine({a: 1.0, b: -0.5}, dense=True, out=tmp_path / "out")
    loaded = load_adapter(tmp_path / "out")
    assert made.labels == loaded.labels == ["cat", "dog", "emu", "fox"]
    assert loaded.deviation < 1e-5  # the last of the six digits in which outputs are stored may round either way
    plain = load_base(BASE, labels=made.labels).state_dict()
    first, second = (load_adapter(f).model.merge_and_unload().state_dict() for f in (a, b))
    changed = 0
    for key, value in loaded.model.merge_and_unload().state_dict().items():
        if "classifier" not in key:
            wanted = plain[key] + (first[key] - plain[key]) - 0.5 * (second[key] - plain[key])
            assert torch.allclose(value, wanted, atol=2e-6)
            changed += not torch.equal(value, plain[key])
    assert changed == len(targets)
    with pytest.raises(InlayError, match="no width; leave width or dense out"):
        combine({a: 1.0}, dense=True, width=4, out=tmp_path / "none")


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Model with `tie_word", "ignore:fan_in_fan_out is")
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["c_attn", "lm_head"]])
def test_a_difference_of_tied_weights_is_refused(targets, tmp_path):
    """It would change both modules, and beside others it would be dropped."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(load_base(GPT2), config).eval()
    folder = save_adapter(model, tmp_path / "tied", processor=TextProcessor(load_tokenizer(GPT2)))
    with pytest.raises(InlayError, match=r"adapter 'tied' changes .*, which the base shares with .*; leave dense out"):
        combine({folder: 1.0}, dense=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def few_steps(monkeypatch):
    """Enough for a loss below that of the start."""
    monkeypatch.setitem(fit_weights.__kwdefaults__, "steps", 12)


def test_weights_are_fitted_on_a_few_examples(few_steps, tmp_path):
    """One adapter was made by taking another one away: fitting has to find out how much of it helps."""
    labels = list(load_images("builtin:digits").labels)
    noise = classifier(tmp_path / "noise", labels, 3)
    zero = classifier(tmp_path / "zero", labels, 4)
    made = combine({noise: 1.0, zero: 1.0}, heads="zero", fit="builtin:digits", examples=20, out=tmp_path / "out")
    fitted = made.fitted
    assert fitted.after < fitted.before and fitted.examples == 20 and made.weights == fitted.weights
    again = combine({noise: 1.0, zero: 1.0}, heads="zero", fit="builtin:digits", examples=20, out=tmp_path / "again")
    assert again.weights == made.weights
    loaded = load_adapter(tmp_path / "out")
    with torch.no_grad():
        loss = load_examples(loaded, "builtin:digits", 20, 0).mean(loaded.model)
    assert loss == pytest.approx(fitted.after, rel=1e-4)
    other = classifier(tmp_path / "other", ["cat", "dog"], 5)
    with pytest.raises(InlayError, match="labels that the adapter does not have"):
        combine({other: 1.0}, fit="builtin:digits", out=tmp_path / "none")
    with pytest.raises(InlayError, match="which are linear in them"):
        combine({other: 1.0}, "ties", fit="builtin:digits", out=tmp_path / "none")


@pytest.mark.parametrize("data", ["builtin:restaurants", "builtin:scenes", "builtin:volumes"])
def test_weights_are_fitted_for_texts_masks_and_volumes(data, few_steps, tmp_path):
    """Of an adapter that is noise, fitting takes away what it can."""
    model = load_base(GPT2 if data == "builtin:restaurants" else SAM)
    if data == "builtin:volumes":
        classes = list(load_volumes(data).labels)
        config = SpatialAdapterConfig.fitted(model, classes, (8, 16, 16), (1.0, 1.0, 1.0), 4)
        processor = VolumeProcessor(None, (8, 16, 16))
    else:
        config = LoraConfig(r=2, target_modules=lora_targets(model))
        text = data == "builtin:restaurants"
        processor = TextProcessor(load_tokenizer(GPT2), max_length=64) if text else load_processor(SAM)
    model = get_peft_model(model, config).eval()
    randomise(model, "default", 3)
    folder = save_adapter(model, tmp_path / "noise", processor=processor)
    made = combine({folder: 1.0}, fit=data, examples=2, out=tmp_path / "out")
    assert made.fitted.after < made.fitted.before and made.fitted.examples == 2
    loaded = load_adapter(made.folder)
    with torch.no_grad():
        loss = load_examples(loaded, data, 2, 0).mean(loaded.model).item()
    assert loss == pytest.approx(made.fitted.after, rel=1e-3)


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["inlay", "combine", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_command(tmp_path, capsys, monkeypatch):
    a, b = classifier(tmp_path / "a", ["cat", "dog"], 3), classifier(tmp_path / "b", ["emu", "fox"], 4)
    report = tmp_path / "report.png"
    given = (f"{a}=1.0", f"{b}=-0.5")
    status, out, _ = run(
        capsys, monkeypatch, *given, "--width", 3, "-o", tmp_path / "out", "--report", report, "--json"
    )
    facts = json.loads(out)
    assert status == 0 and report.stat().st_size > 1000 and 0 < facts["error"] < 1
    assert facts["weights"] == {"a": 1.0, "b": -0.5} and facts["labels"] == ["cat", "dog", "emu", "fox"]
    status, out, _ = run(capsys, monkeypatch, *given, "-o", tmp_path / "exact")
    assert status == 0 and "0: exact" in out and load_adapter(tmp_path / "exact").labels == facts["labels"]
    status, out, _ = run(capsys, monkeypatch, a, b)
    assert status == 0 and "a and b:" in out and "interference" in out
    for wrong, sentence in [
        (("a=x", "-o", "out"), "'a=x' must be ADAPTER=WEIGHT"),
        ((a, f"{a}=2", "-o", "out"), "named twice"),
        ((a, "--width", "wide", "-o", tmp_path / "none"), "width must be a whole number of at least 1 or 'auto'"),
        ((tmp_path / "nothing", "-o", "out"), "does not exist"),
    ]:
        status, out, err = run(capsys, monkeypatch, *wrong)
        assert status == 2 and out == "" and sentence in err and err.count("\n") == 1
