"""What the cases share: tiny random bases, and peft's own decisions on skipping, taken as inlay's methods need them.

`python -m peft_suite.cases` makes the bases.
"""

import copy
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BASES = Path(os.environ["PEFT_SUITE_BASES"])


def make_bases() -> None:
    """Save five models of two blocks, in which peft's tests look for their checkpoints."""
    import torch
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        SamVisionConfig,
        SamVisionModel,
        ViTConfig,
        ViTForImageClassification,
    )

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sam = SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_dim=64, image_size=64, patch_size=8,
        window_size=3, global_attn_indexes=[1], output_channels=16, initializer_range=0.02,
    )  # fmt: skip
    models = {
        "GPT2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **text)),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, **text)),
        "Bert": lambda: BertModel(BertConfig(**size, vocab_size=200)),
        "ViT": lambda: ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8, num_labels=5)),
        "SamVision": lambda: SamVisionModel(sam),
    }
    for name, make in models.items():
        torch.manual_seed(0)
        make().save_pretrained(BASES / f"tiny-{name}")


def base(name: str) -> str:
    """The folder of one of them."""
    return str(BASES / f"tiny-{name}")


def parts(*of: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Settings of a composite: its parts as plain settings, of which each test makes new configs."""
    return {"parts": [{"peft_type": kind, **settings} for kind, settings in of], **more}


def merges(config_class: type, settings: dict[str, Any]) -> bool:
    """Whether inlay merges such an adapter; it refuses the others with the reason."""
    kind = config_class.__name__
    if kind == "BottleneckConfig":
        linear = settings.get("activation", "relu") is None
        return linear and settings.get("placement", "serial") == "serial"
    if kind == "CompositeConfig":
        return all(part["peft_type"] in ("LORA", "INLAY_PARTIAL") for part in settings["parts"])
    return kind in ("PartialConfig", "SsfConfig")


def patch(module: ModuleType) -> None:
    """Put inlay's refusals and initialisations where peft's tests decide on skipping."""
    import peft_tests.testing_common as common
    import peft_tests.testing_utils as utils
    import torch

    torch.set_num_threads(1)
    skip, initialise = common._skip_if_merging_not_supported, utils.set_init_weights_false

    def skip_unless_it_merges(model_id: str, config_class: type, settings: dict[str, Any]) -> None:
        if not merges(config_class, settings):
            pytest.skip("inlay refuses to merge this one, with its reason")
        skip(model_id, config_class, settings)

    def without_initialisation(config_class: type, settings: dict[str, Any]) -> dict[str, Any]:
        if config_class.__name__ != "CompositeConfig":
            return initialise(config_class, settings)
        settings = copy.deepcopy(settings)
        for part in settings["parts"]:
            part["init_lora_weights" if part["peft_type"] == "LORA" else "init_weights"] = False
        return settings

    replaced = {
        "_skip_if_conv1d_not_supported": lambda *arguments: None,  # ours take GPT-2's Conv1D
        "_skip_if_merging_not_supported": skip_unless_it_merges,
        "set_init_weights_false": without_initialisation,
    }
    for place in (common, module):
        for name, function in replaced.items():
            if hasattr(place, name):
                setattr(place, name, function)


if __name__ == "__main__":
    make_bases()
