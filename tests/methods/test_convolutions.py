"""Every method on every family of convolutional networks trains, loads, merges, is served and adds, or says why not."""

import copy
import json
import shutil

import pytest
import torch

from convolutional_networks import FAMILIES, build_network, draw_batch
from inlay import Bank, combine, load_adapter, load_base, load_processor, save_adapter
from inlay.bases.sites import head_modules
from inlay.errors import InlayError
from inlay.methods import METHODS

TRIED = [name for name, method in METHODS.items() if "conv" in method.bases and name != "rslora"]
LABELS = ["a", "b", "c"]
# Of many modules, so that they take most of the time: the bank and the sum are tried there with one method.
DEEP = ("MobileNetV1", "MobileViT", "MobileViTV2", "EfficientNet", "Levit", "SwiftFormer", "HGNetV2")
# What is refused when a method is put in: by family and method, in these words.
NOT_ADAPTED = {
    ("Bit", "lora"): "make another weight of theirs before they compute",
    ("Levit", "conv-adapter"): "has no convolution of more than 1x1 behind its stem",
    ("SqueezeNet", "norm"): "has no norms to train",
}
# What is refused of a trained adapter.
NOT_MERGED = {("Bit", "ssf"): "does not multiply with its weight as it stands"}
NOT_SERVED = {
    ("Bit", "lora-conv"): "makes another weight or input of its own first",
    ("Bit", "norm"): "a bank holds biases and norms .* not whole weights",
    ("Bit", "bias"): "a bank holds biases and norms .* not whole weights",
    ("ConvNextV2", "bias"): "a bank holds biases and norms .* not whole weights",  # of its response normalisation
    (None, "partial"): "a bank holds biases and norms .* not whole weights",
    ("Levit", None): "a bank holds heads of one linear layer",
}


def why_not(table, family, method):
    """The words of a table for a pair; None where it is fine."""
    return next((table[key] for key in ((family, method), (None, method), (family, None)) if key in table), None)


@pytest.fixture(scope="module", params=FAMILIES)
def network(request, tmp_path_factory):
    """The name of a family, and one of its networks with a new head, as `load_base` gives it."""
    folder = tmp_path_factory.mktemp(request.param)
    build_network(request.param).save_pretrained(folder)
    side = draw_batch(request.param)["pixel_values"].shape[-1]
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    return request.param, load_base(folder, labels=LABELS)


@torch.no_grad()
def compute(model, family):
    return model(pixel_values=draw_batch(family)["pixel_values"]).logits


def off(found, wanted):
    """The largest difference, relative to the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def train_two_steps(model, family):
    """Plain steps that call model.train(); then all that is trained moves at random, so that nothing is near zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**draw_batch(family, labels=len(LABELS))).loss.backward()
        assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
        optimizer.step()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model.eval()


@pytest.mark.parametrize("method", TRIED)
def test_a_method_fits_or_says_why_not(method, network, tmp_path):
    family, base = network
    model = copy.deepcopy(base)
    if reason := why_not(NOT_ADAPTED, family, method):
        with pytest.raises(InlayError, match=reason):
            METHODS[method].adapt(model, 2)
        return
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    torch.manual_seed(0)
    model = METHODS[method].adapt(model, 2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads = tuple(f"base_model.model.{name}.modules_to_save." for name in head_modules(base))
    if METHODS[method].trains == "adapter":
        assert all("lora_" in name or "inlay_" in name or name.startswith(heads) for name in trained)
    train_two_steps(model, family)
    found = {n.replace("base_model.model.", "").replace("base_layer.", ""): b for n, b in model.named_buffers()}
    assert all(torch.equal(found[name], value) for name, value in statistics.items() if name in found)
    wanted = compute(model, family)
    assert off(compute(base, family), wanted) > 1e-3
    if METHODS[method].trains != "adapter":
        model.save_pretrained(tmp_path / "whole")
        assert off(compute(load_base(tmp_path / "whole"), family), wanted) < 2e-5
        return

    folder = save_adapter(model, tmp_path / "a", processor=load_processor(base.name_or_path))
    loaded = load_adapter(folder, base=copy.deepcopy(base))
    assert loaded.deviation < 2e-5 and off(compute(loaded.model, family), wanted) < 2e-5
    merged = check_merge(loaded, method, family, wanted)
    if family not in DEEP or method == "lora-conv":
        check_bank(folder, base, method, family, wanted)
        check_sum(folder, base, family, wanted, merged)


def check_merge(loaded, method, family, wanted):
    """Merged it computes the same; gives the merged weights."""
    reason = why_not(NOT_MERGED, family, method)
    if reason or not METHODS[method].merges:
        with pytest.raises(InlayError, match=reason or "fold|merged"):
            loaded.merge()
        return None
    merged = loaded.merge().model
    assert off(compute(merged, family), wanted) < 2e-5
    return merged.state_dict()


def check_bank(folder, base, method, family, wanted):
    """A row of a mixed batch has what its adapter gives by itself."""
    plain = copy.deepcopy(base)
    if reason := why_not(NOT_SERVED, family, method):
        with pytest.raises(InlayError, match=reason):
            Bank(plain, {"a": folder})
        return
    found = Bank(plain, {"a": folder})(
        {"pixel_values": draw_batch(family)["pixel_values"]}, ["a", None, "a", "a"]
    ).logits
    assert off(found[[0, 2, 3]], wanted[[0, 2, 3]]) < 1e-4
    assert off(found[1], compute(base, family)[1]) < 1e-4


def check_sum(folder, base, family, wanted, merged):
    """Of an adapter and minus a half of it, what half of its change of the weights gives; or, of what does not merge,
    one and a half of it less a half, the adapter."""
    twin = shutil.copytree(folder, folder.parent / "b")
    total = combine({folder: 1.0 if merged else 1.5, twin: -0.5}, out=folder.parent / "sum", heads="a").folder
    found = compute(load_adapter(total, base=copy.deepcopy(base)).model, family)
    if merged is None:
        assert off(found, wanted) < 1e-4
        return
    half, heads = copy.deepcopy(base), tuple(f"{name}." for name in head_modules(base))
    before = half.state_dict()
    half.load_state_dict(
        {k: v if k.startswith(heads) or not v.is_floating_point() else (v + before[k]) / 2 for k, v in merged.items()}
    )
    assert off(found, compute(half, family)) < 1e-4
