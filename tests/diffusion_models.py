"""Tiny pipelines of diffusers with random weights, of each kind that inlay adapts, written to a folder."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def write_pipeline(folder: Path, kind: str = "sd", seed: int = 0) -> Path:
    """A pipeline for images of 16 pixels a side; kind is sd, sdxl or sd3 (without T5)."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = _make_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip
    blocks = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    ddim = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    if kind == "sd":
        unet = diffusers.UNet2DConditionModel(**blocks, cross_attention_dim=16, attention_head_dim=4)
        made = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=_make_clip(), tokenizer=tokenizer, unet=unet, scheduler=ddim,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "sdxl":
        unet = diffusers.UNet2DConditionModel(
            **blocks, cross_attention_dim=32, attention_head_dim=4, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 16, use_linear_projection=True,
        )  # fmt: skip
        made = diffusers.StableDiffusionXLPipeline(
            vae=vae, text_encoder=_make_clip(), text_encoder_2=_make_clip(projected=True), tokenizer=tokenizer,
            tokenizer_2=tokenizer, unet=unet, scheduler=ddim, add_watermarker=False,
        )  # fmt: skip
    else:
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip
        made = diffusers.StableDiffusion3Pipeline(
            vae=vae, text_encoder=_make_clip(projected=True), text_encoder_2=_make_clip(projected=True),
            text_encoder_3=None, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=None, transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def _make_clip(projected: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, bos_token_id=62, eos_token_id=63, pad_token_id=63,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, and nothing longer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "sks</w>"]
    words += [f"<unused{i}>" for i in range(62 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)
