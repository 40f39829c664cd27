"""Pre-train the embedded SAM on generated scenes, on one CPU core.

    python recipes/pretrain_sam.py                           # builtin:sam-tiny, about 40 minutes on a quiet core
    python recipes/pretrain_sam.py --steps 50 --folder /tmp/try

As in Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): a point or a box asks for a mask, the best of three
answers counts; then points in the errors, with the mask itself half of the time, ask for a single better one.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from inlay import run_recipe

SIDE, PROMPTS = 128, 8  # pixels; objects asked for in each picture


@dataclass
class Recipe:
    """How long, and where to."""

    folder: str = field(default="src/inlay/builtin/sam-tiny", metadata={"help": "Where the base is saved."})
    steps: int = field(default=2400, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=10, metadata={"help": "Scenes a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak rate of AdamW and of Muon."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, scenes and prompts."})


def new_model() -> Any:
    """A SAM of 1.4 M parameters for pictures of 128 x 128, in patches of 8 x 8."""
    import torch
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    size, narrow = {"image_size": SIDE, "patch_size": 8}, {"hidden_size": 64}
    depth = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "mlp_dim": 512}
    windows = {"window_size": 8, "global_attn_indexes": [2, 5], "output_channels": 64, "num_pos_feats": 32}
    vision = SamVisionConfig(**size, **depth, **windows, initializer_range=0.05)
    decoder = SamMaskDecoderConfig(**narrow, mlp_dim=256, num_attention_heads=4, iou_head_hidden_dim=64)
    prompts = SamPromptEncoderConfig(**size, **narrow)
    parts = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    model = SamModel(SamConfig(**parts))
    for module in (*model.prompt_encoder.modules(), *model.mask_decoder.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as in the original code; transformers draws nearly nothing
    for name, module in model.mask_decoder.named_modules():
        if name.endswith(("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")):
            with torch.no_grad():  # queries as keys: a point begins by looking at its own place
                module.q_proj.weight.mul_(3)
                module.k_proj.weight.copy_(module.q_proj.weight)
    with torch.no_grad():  # and far too wild a positional encoding: half the width is its deviation
        model.shared_image_embedding.positional_embedding.normal_()
        model.vision_encoder.pos_embed.normal_(std=0.02)
    return model


def new_optimizers(model: Any, recipe: Recipe) -> list[Any]:
    """As in pretrain_builtin.py: Muon for the matrices of the blocks, AdamW for the rest, with warm-up and cosine."""
    import torch
    from transformers import get_scheduler

    named = dict(model.named_parameters())
    named.pop("shared_image_embedding.positional_embedding").requires_grad_(False)
    inner = {k: p for k, p in named.items() if p.ndim == 2 and ".layers." in k and "rel_pos" not in k}
    outer = [p for name, p in named.items() if name not in inner]
    adamw = torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(inner.values(), lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [(o, get_scheduler("cosine", o, 30, recipe.steps)) for o in (adamw, muon)]


def drawn(count: int, seed: int, kind: Any = "mixed") -> tuple[Any, Any]:
    """Pixels (B 3 H W, as the processor makes them) and objects (B P H W) of scenes."""
    import torch
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from inlay.data.prompts import draw_objects
    from inlay.data.scenes import scenes

    made = scenes(count, seed=seed, size=SIDE, kind=kind)
    pixels = torch.from_numpy(made.pictures).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels - mean) / std, draw_objects(made, PROMPTS)


CARD = """\
# sam-tiny

A `SamModel` for pictures of 128 x 128 (patches of 8 x 8, 6 blocks of width 128; masks of 64 x 64), {parameters:,}
parameters in fp16: the base that inlay embeds, so that recipes and tests run without a download. It is truly
pre-trained, and of little use beyond that.

- **Trained on** {pictures:,} scenes that `inlay.data.scenes` draws (`mixed`: blobs, boxes, polygons, tubes and
  crescents, textured, nested and overlapping) with {prompts} prompts each. No photographs, nobody's data.
- **Quality**: mean IoU of the mask that the model itself thinks best, on held-out scenes (`cells` it never saw):

  | scenes | 1 point | 3 points | box |
  |---|---|---|---|
{table}
- **Made by** `python recipes/pretrain_sam.py`: seed {recipe.seed}, {recipe.steps:,} steps of {recipe.batch_size}
  scenes, torch {torch}.
- **Licence**: Apache-2.0, as inlay.
"""


def measure(model: Any, kind: str) -> list[float]:
    """Mean IoU on 128 held-out scenes for 1 point, 3 points (two of them in errors) and a box."""
    import torch

    from inlay.train.clicks import conversation, overlaps

    torch.manual_seed(1)
    found: list[list[Any]] = [[], [], [], []]
    for seed in range(1, 17):
        with torch.inference_mode():
            pixels, objects = drawn(8, seed, kind)
            embeddings = model.vision_encoder(pixels)[0]
            talks = [conversation(model, embeddings, objects, *how) for how in (([1, 1, 1],), ([1], True))]
            for column, answer in zip(found, (a for talk in talks for a in talk), strict=True):
                column.append(overlaps(*answer))
    return [float(torch.cat(found[i]).mean()) for i in (0, 2, 3)]


def main(recipe: Recipe) -> None:
    """Generate, train, measure, save."""
    import torch
    from tqdm.auto import trange
    from transformers import SamImageProcessorPil

    from inlay.atomic import writing
    from inlay.train.clicks import conversation
    from inlay.train.losses import mask_losses

    # 1. data: drawn on the way; held-out scenes have a seed apart

    # 2. model
    torch.manual_seed(recipe.seed)
    model = new_model().eval()
    before = {kind: measure(model, kind) for kind in ("mixed", "cells")}

    # 3. train: half of the objects by clicks, half by boxes
    torch.manual_seed(recipe.seed)
    optimizers, begun = new_optimizers(model, recipe), time.perf_counter()
    for step in (bar := trange(recipe.steps, disable=None)):
        pixels, objects = drawn(recipe.batch_size, seed=1_000_000 * (recipe.seed + 1) + step)
        embeddings, losses = model.vision_encoder(pixels)[0], []
        for boxes, part in enumerate(objects.chunk(2, dim=1)):
            early = step < recipe.steps // 4
            clicks = [1] if early else [1, int(torch.randint(1, 5, ()))]
            answers = conversation(model, embeddings, part, clicks, bool(boxes))
            losses += [mask_losses(*answer, balanced=step < recipe.steps // 2).mean() for answer in answers]
        (loss := torch.stack(losses).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            bar.write(f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}")
    minutes = (time.perf_counter() - begun) / 60

    # 4. measure, as it will be stored: in fp16
    model = model.half().float()
    after = {kind: measure(model, kind) for kind in before}

    # 5. save, with its card
    notes = {"": after, ", untrained": before}
    rows = [[kind + note, *(f"{v:.3f}" for v in of[kind])] for note, of in notes.items() for kind in of]
    square, small = ({"height": side, "width": side} for side in (SIDE, SIDE // 2))
    sizes = {"size": {"longest_edge": SIDE}, "pad_size": square}
    masks = {"mask_size": {"longest_edge": SIDE // 2}, "mask_pad_size": small}
    with writing(recipe.folder) as folder:
        model.half().save_pretrained(str(folder))
        SamImageProcessorPil(**sizes, **masks).save_pretrained(str(folder))
        filled = CARD.format(
            recipe=recipe,
            parameters=model.num_parameters(),
            pictures=recipe.steps * recipe.batch_size,
            prompts=PROMPTS,
            table="\n".join(f"  | {' | '.join(row)} |" for row in rows),
            torch=torch.__version__.partition("+")[0],
        )
        (folder / "README.md").write_text(filled, encoding="utf-8")
    print(f"mean IoU {after} (untrained {before}) after {minutes:.1f} minutes; {recipe.folder}")


if __name__ == "__main__":
    run_recipe(main, Recipe())
