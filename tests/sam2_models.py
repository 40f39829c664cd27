"""A tiny SAM 2 with random weights: four stages, windows that pad, one block that attends to the whole image."""

import torch
from transformers import Sam2Config, Sam2Model

SIDE = 64  # pixels of an image


def sam2_config(**more):
    """Of Sam2Config: the geometry of facebook/sam2.1-hiera-tiny, narrow and with five blocks."""
    stages = {
        "hidden_size": 8, "embed_dim_per_stage": [8, 12, 16, 20], "num_attention_heads_per_stage": [1, 2, 2, 2],
        "blocks_per_stage": [1, 1, 2, 1], "window_size_per_stage": [4, 2, 3, 2], "global_attention_blocks": [3],
        "image_size": [SIDE, SIDE], "window_positional_embedding_background_size": [3, 3], "initializer_range": 0.1,
    }  # fmt: skip
    vision = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", **stages}, "fpn_hidden_size": 16,
        "backbone_channel_list": [20, 16, 12, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "initializer_range": 0.1,
    }  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": SIDE, "mask_input_channels": 4}
    return Sam2Config(
        vision_config={"model_type": "sam2_vision_model", **vision},
        mask_decoder_config=decoder,
        prompt_encoder_config=prompts,
        initializer_range=0.1,
        **more,
    )


def build_sam2(seed=0):
    """In eval mode, with places and a memory embedding that are not zero; the same at each call."""
    torch.manual_seed(seed)
    model = Sam2Model(sam2_config()).eval().requires_grad_(False)
    backbone = model.vision_encoder.backbone
    for value in (backbone.pos_embed, backbone.pos_embed_window, model.no_memory_embedding):
        value.normal_(std=0.2)
    return model


def write_sam2(folder, seed=0):
    """Saved, as from the Hub but for its preprocessing."""
    build_sam2(seed).save_pretrained(folder)
    return folder
