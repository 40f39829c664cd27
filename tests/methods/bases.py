"""The bases of the contract: tiny, random, one of each kind of model."""

import torch
import transformers as hf
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SamVisionConfig,
    SamVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from convolutional_networks import build_network, draw_batch
from inlay.methods import METHODS
from sam2_models import build_sam2

OURS = [
    "bottleneck",
    "bottleneck-mlp",
    "bottleneck-parallel",
    "bottleneck-linear",
    "adapter-plus",
    "ssf",
    "convpass",
    "conv-adapter",
    "lora-conv",
    "visual-prompt",
    "visual-prompt-shallow",
    "attention-prefix",
    "partial",
    "bias",
    "norm",
    "mam",
    "lora-prompt",
]
PEFTS = ["lora", "rslora", "dora", "ia3", "pissa"]
PROMPTS = ["prompt", "prefix"]  # peft's own for language models, which wrap no module
KINDS = {
    "vit": "vision",
    "sam": "sam",
    "sam2": "sam",
    "resnet": "conv",
    "gpt2": "text",
    "bert": "text",
    "llama": "text",
}
ON_SAM2 = ("lora", "bottleneck", "bottleneck-linear", "adapter-plus", "visual-prompt", "attention-prefix", "partial")
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}


def build(base, blocks=3):
    """A model in eval mode, the same at each call."""
    torch.manual_seed(0)
    size = SIZE | {"num_hidden_layers": blocks}
    if base == "vit":
        model = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=4, num_labels=5))
    elif base == "sam":
        size["mlp_dim"] = size.pop("intermediate_size")
        # windows of 3 x 3 over 8 x 8 patches: the last ones are padded; the last block attends globally
        windows = {"image_size": 32, "patch_size": 4, "window_size": 3, "global_attn_indexes": [blocks - 1]}
        model = SamVisionModel(SamVisionConfig(**size, **windows, output_channels=16, initializer_range=0.02))
    elif base == "sam2":
        model = build_sam2().vision_encoder
    elif base == "resnet":
        model = build_network("ResNet")
    elif base == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=blocks, n_head=4, n_positions=64, **TEXT))
    elif base == "bert":
        model = BertForSequenceClassification(BertConfig(**size, vocab_size=100, initializer_range=0.2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, **TEXT))
    return model.eval().requires_grad_(
        False
    )  # attention kernels differ in their last bits when gradients are asked for


def build_other(name):
    """Models with parts that plain fine-tuning gives no gradient: a pooler, a mask token, cross-attention ..."""
    torch.manual_seed(0)
    image = {**SIZE, "image_size": 16, "patch_size": 4}
    clip = {"vision_config": image, "text_config": {**SIZE, **TEXT}}
    config = {
        "CLIPForImageClassification": lambda: hf.CLIPConfig(**clip, num_labels=5),
        "CLIPVisionModel": lambda: hf.CLIPVisionConfig(**image),
        "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionConfig(**image),
        "SiglipForImageClassification": lambda: hf.SiglipConfig(**clip, num_labels=5),
        "SiglipVisionModel": lambda: hf.SiglipVisionConfig(**image),
        "Dinov2ForImageClassification": lambda: hf.Dinov2Config(
            **{k: v for k, v in image.items() if k != "intermediate_size"}, num_labels=5
        ),
        "ViTModel": lambda: hf.ViTConfig(**image),
        "BertModel": lambda: hf.BertConfig(**SIZE, vocab_size=100),
        "BertForSequenceClassification": lambda: hf.BertConfig(**SIZE, vocab_size=100),
        "GPT2LMHeadModel": lambda: hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, add_cross_attention=True, **TEXT),
    }
    return getattr(hf, name)(config[name]())


OTHERS = {
    "CLIPForImageClassification": "logits",
    "CLIPVisionModel": "last_hidden_state",
    "CLIPVisionModelWithProjection": "image_embeds",
    "SiglipForImageClassification": "logits",
    "SiglipVisionModel": "last_hidden_state",
    "Dinov2ForImageClassification": "logits",
    "ViTModel": "last_hidden_state",
    "BertModel": "last_hidden_state",
    "BertForSequenceClassification": "logits",
    "GPT2LMHeadModel": "logits",
}


def batch(base):
    """Four examples (SAM and SAM 2 two); texts are padded, those of decoders on the left."""
    generator = torch.Generator().manual_seed(1)
    if base == "resnet":
        return {"pixel_values": draw_batch("ResNet")["pixel_values"]}
    if base in ("vit", "sam", "sam2"):
        rows, size = {"vit": (4, 16), "sam": (2, 32), "sam2": (2, 64)}[base]
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[2:, slice(6, None) if base == "bert" else slice(0, 4)] = 0
    return {"input_ids": torch.randint(3, 100, (4, 10), generator=generator), "attention_mask": mask}


def compute(model, base, **more):
    """Logits, or SAM's features, at the places that count."""
    output = model(**batch(base), **more)
    if base == "sam2":
        return torch.cat([level.flatten(1) for level in output.fpn_hidden_states], 1)
    values = output.logits if "logits" in output else output.last_hidden_state
    if base not in ("gpt2", "llama"):
        return values
    mask = batch(base)["attention_mask"].bool()
    return values[:, -mask.shape[1] :][mask]  # peft's prompts stand in front


def randomise(model, adapter, seed=3):
    """Give all parameters of an adapter and its head values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(method, base, width=4, adapter="default", blocks=3):
    """The base with a random adapter of that name."""
    from peft import get_peft_model

    model = build(base, blocks)
    torch.manual_seed(5)
    config = METHODS[method].config(model, width)
    if base == "vit":
        config.modules_to_save = ["classifier"]
    model = get_peft_model(model, config, adapter_name=adapter).eval()
    randomise(model, adapter)
    return model


def pairs(methods):
    """Methods and bases that go together.

    Llama has no biases to train. SAM 2 has the methods that see its stages. peft's prompts are tested on decoders.
    """
    return [
        (method, base)
        for base, kind in KINDS.items()
        for method in methods
        if kind in METHODS[method].bases
        and (method, base) != ("bias", "llama")
        and (base != "sam2" or method in ON_SAM2)
        and (method not in PROMPTS or base in ("gpt2", "llama"))
    ]
