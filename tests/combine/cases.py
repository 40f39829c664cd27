"""Adapters for the tests of combine: random ones on the tiny bases of the contract, saved by peft."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from inlay import BottleneckConfig, PartialConfig
from methods.bases import batch, build, randomise

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
