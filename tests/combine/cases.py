"""Adapters for the tests of combine: random ones on the tiny bases of the contract, saved by peft."""

import copy
import json
import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from inlay import BottleneckConfig, PartialConfig, load_base, load_processor, save_adapter
from inlay.bases.sites import head_modules, lora_targets
from methods.bases import batch, build, randomise

BASE = "builtin:vit-tiny"
LINEAR = ["q_proj", "v_proj", "fc1"]


def save(folder, base, config, seed, adapter="default"):
    """A random adapter on a base of the contract."""
    torch.manual_seed(seed)
    model = get_peft_model(build(base) if isinstance(base, str) else base(), copy.deepcopy(config)).eval()
    randomise(model, adapter, seed)
    model.save_pretrained(folder)
    return folder


def lora(**settings):
    """LoRA of the test's ViT."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings})


def wide(**settings):
    """A bottleneck."""
    return BottleneckConfig(**{"width": 4, **settings})


def partial(**settings):
    """The last block's weights."""
    return PartialConfig(**{"last": 1, **settings})


def features(model, base):
    """What the model gives before a head, in float64."""
    given = batch(base) if isinstance(base, str) else base
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        output = model.double()(**given, output_hidden_states=True)
    return torch.stack([h.flatten() for h in output.hidden_states[-1:]]) if "hidden_states" in output else output[0]


def load(base, folder):
    """A base with an adapter, as peft loads it."""
    return PeftModel.from_pretrained(build(base) if isinstance(base, str) else base(), str(folder)).eval()


class Convolutions(nn.Module):
    """An embedding, a plain and a grouped convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=2)

    def forward(self, ids):
        """(B, H, W) -> (B, 6, H, W)."""
        return self.grouped(self.conv(self.table(ids).movedim(-1, 1)))


def updates(folder):
    """ΔW of a LoRA in float64, by module, from the formula in peft's documentation."""
    weights, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    found = {}
    for key, down in weights.items():
        if ".lora_A." not in key and not key.endswith("lora_embedding_A"):
            continue
        up = weights[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].double()
        site = key.removeprefix("base_model.model.").split(".lora_")[0]
        alpha = next(
            (v for k, v in config["alpha_pattern"].items() if site.endswith(k.replace("\\", ""))), config["lora_alpha"]
        )
        rank = len(down)
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        groups = rank // up.shape[1]
        down, up = down.double().reshape(groups, rank // groups, -1), up.reshape(groups, -1, rank // groups)
        found[site] = scale * (up @ down).reshape(-1, down.shape[-1])
        bias = weights.get(key.replace("lora_A.weight", "lora_B.bias")) if ".lora_A." in key else None
        if bias is not None:
            found[f"{site}.bias"] = scale * bias.double()[None]
    return found


def off(found, wanted):
    """The largest relative error of a module."""
    worst = 0.0
    for site in found.keys() | wanted.keys():
        a, b = found.get(site), wanted.get(site)
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        worst = max(
            worst, ((a - b).norm() / b.norm().clamp_min(1e-12)).item() if b.norm() > 1e-9 else (a - b).norm().item()
        )
    return worst


def same_outputs(base, one, other, limit=1e-6):
    """Relative difference of two models in float64."""
    values = [
        model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in batch(base).items()})
        for model in (one, other)
    ]
    x, y = (v.logits if "logits" in v else v.last_hidden_state for v in values)
    return ((x - y).norm() / y.norm()).item() < limit


def classifier(folder, labels, seed, processor=None, base=BASE, change=0.0):
    """A random LoRA with a head for these labels, saved with its record."""
    torch.manual_seed(seed)
    model = load_base(base, labels=list(labels))
    if change:
        for parameter in model.parameters():
            parameter.data += change * torch.randn_like(parameter) * parameter.std().nan_to_num()
    config = LoraConfig(r=2, target_modules=lora_targets(model, "attention"), modules_to_save=head_modules(model))
    model = get_peft_model(model, config).eval()
    randomise(model, "default", seed)
    metrics = {"dataset": f"data of {folder.name}"}
    return save_adapter(model, folder, processor=processor or load_processor(BASE), metrics=metrics)


# Of a made-up pipeline: output sizes, then those of the input (channels, and the sides of a kernel).
LAYERS = {
    "unet.mid.to_q": ((7,), (12,)),
    "unet.mid.conv1": ((9, 1, 1), (5, 3, 3)),
    "text_encoder.layers.0.q_proj": ((6,), (8,)),
}


def write_lora(folder, seed, rank=3, layers=LAYERS, change=None):
    """A random LoRA of linear layers and convolutions, as plain peft writes it, without any model."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for site, ((rows, *ones), (channels, *sides)) in layers.items():
        weights[f"base_model.model.{site}.lora_A.weight"] = torch.randn(rank, channels, *sides, generator=generator)
        weights[f"base_model.model.{site}.lora_B.weight"] = torch.randn(rows, rank, *ones, generator=generator)
    if change is not None:
        change(weights)
    config = LoraConfig(r=rank, lora_alpha=seed + 2, target_modules=[*layers])
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
