"""Pre-train the embedded SAM on generated scenes, on one CPU core.

    python recipes/pretrain/sam.py                           # builtin:sam-tiny, about 20 minutes on a quiet core

As in Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): a point or a box asks for a mask, the best of three
answers counts; then points in the errors, with the mask itself half of the time, ask for a single better one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import SamConfig, SamImageProcessorPil, SamModel, get_scheduler

from inlay import option, run_recipe
from inlay.builtin.scenes import generate_scenes
from inlay.files.atomic import writing
from inlay.tasks.masks.clicks import answer_clicks, score_clicks
from inlay.tasks.masks.loss import mask_losses
from inlay.tasks.masks.prompts import draw_objects

SIDE, PROMPTS = 128, 8  # pixels; objects asked for in each image


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("src/inlay/builtin/sam-tiny", "Where the base is saved.")
    steps: int = option(1600, "Optimiser steps.", least=1)
    batch_size: int = option(10, "Scenes a step.", least=1)
    learning_rate: float = option(3e-3, "Peak rate of AdamW and of Muon.", above=0)
    seed: int = option(0, "Seed of weights, scenes and prompts.", least=0)


def new_model() -> Any:
    """A SAM of 1.5 M parameters for images of 128 x 128, in patches of 8 x 8."""
    size, narrow = {"image_size": SIDE, "patch_size": 8}, {"hidden_size": 64}
    vision: Any = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "mlp_dim": 512, **size}
    vision |= {"window_size": 8, "global_attn_indexes": [2, 5], "output_channels": 64, "num_pos_feats": 32}
    vision["initializer_range"] = 0.05
    decoder = {**narrow, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=size | narrow, mask_decoder_config=decoder))
    for module in (*model.prompt_encoder.modules(), *model.mask_decoder.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as in the original code; transformers draws nearly nothing
    with torch.no_grad():
        for name, module in model.mask_decoder.named_modules():
            if name.endswith(("_token_to_image", "_image_to_token")):
                module.q_proj.weight.mul_(3)  # queries as keys: a point begins by looking at its own place
                module.k_proj.weight.copy_(module.q_proj.weight)
        model.shared_image_embedding.positional_embedding.normal_()  # transformers draws it far too wild
        model.vision_encoder.pos_embed.normal_(std=0.02)
    return model


def new_processor() -> Any:
    """Images at 128 pixels, their masks at 64."""
    sizes = {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
    masks = {"mask_size": {"longest_edge": SIDE // 2}, "mask_pad_size": {"height": SIDE // 2, "width": SIDE // 2}}
    return SamImageProcessorPil(**sizes, **masks)


def new_optimizers(model: Any, recipe: Pretraining) -> list[Any]:
    """As in vit.py: Muon for the matrices of the blocks, AdamW for the rest, with warm-up and cosine."""
    model.shared_image_embedding.requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {k: p for k, p in named.items() if p.ndim == 2 and ".layers." in k and "rel_pos" not in k}
    outer = [p for name, p in named.items() if name not in inner]
    adamw = torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(inner.values(), lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [(o, get_scheduler("cosine", o, 30, recipe.steps)) for o in (adamw, muon)]


def drawn(count: int, seed: int, kind: Any = "mixed") -> tuple[Any, Any]:
    """Pixels (B 3 H W) and objects (B P H W) of scenes."""
    made = generate_scenes(count, seed=seed, size=SIDE, kind=kind)
    return new_processor()(list(made.images), return_tensors="pt")["pixel_values"], draw_objects(made, PROMPTS)


CARD = """\
# sam-tiny

A `SamModel` for images of 128 x 128 (patches of 8 x 8, 6 blocks of width 128; masks of 64 x 64), {size:,}
parameters in fp16: the base that inlay embeds, so that recipes and tests run without a download. It is truly
pre-trained, and of little use beyond that.

- **Trained on** {images:,} scenes that `inlay.builtin.scenes` draws (`mixed`: blobs, boxes, polygons, tubes and
  crescents, textured, nested and overlapping) with {prompts} prompts each. No photographs, nobody's data.
- **Quality**: mean IoU of the mask that the model itself thinks best, on held-out scenes (`cells` it never saw):

  | scenes | 1 point | 3 points | box |
  |---|---|---|---|
{table}
- **Made by** `python recipes/pretrain/sam.py`: seed {recipe.seed}, {recipe.steps:,} steps of {recipe.batch_size}
  scenes, torch {torch}.
- **Licence**: Apache-2.0, as inlay.
"""


def measure(model: Any, kind: str) -> list[float]:
    """Mean IoU on held-out scenes for 1 point, 3 points and a box."""
    torch.manual_seed(1)
    parts = [score_clicks(model, *drawn(8, seed, kind)).values() for seed in range(1, 17)]
    return [float(sum(each.mean() for each in column) / 16) for column in zip(*parts, strict=True)]


def main(recipe: Pretraining) -> None:
    """Generate, train, measure, save."""
    # 1. data: drawn on the way; held-out scenes have a seed apart. 2. model
    torch.manual_seed(recipe.seed)
    model = new_model().eval()
    before = {f"{kind}, untrained": measure(model, kind) for kind in ("mixed", "cells")}

    # 3. train: half of the objects by clicks, half by boxes
    torch.manual_seed(recipe.seed)
    optimizers = new_optimizers(model, recipe)
    for step in range(recipe.steps):
        pixels, objects = drawn(recipe.batch_size, seed=1_000_000 * (recipe.seed + 1) + step)
        embeddings, losses = model.vision_encoder(pixels)[0], []
        for boxes, part in enumerate(objects.chunk(2, dim=1)):
            clicks = [1] if step < recipe.steps // 4 else [1, int(torch.randint(1, 5, ()))]
            answers = answer_clicks(model, embeddings, part, clicks, bool(boxes))
            losses += [mask_losses(*answer, balanced=step < recipe.steps // 2).mean() for answer in answers]
        (loss := torch.stack(losses).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}", flush=True)

    # 4. measure, as it will be stored: in fp16
    model = model.half().float()
    found = {kind: measure(model, kind) for kind in ("mixed", "cells")} | before

    # 5. save, with its card
    table = [f"  | {kind} | {' | '.join(f'{value:.3f}' for value in row)} |" for kind, row in found.items()]
    figures = {"size": model.num_parameters(), "images": recipe.steps * recipe.batch_size, "prompts": PROMPTS}
    with writing(recipe.folder) as folder:
        model.half().save_pretrained(str(folder))
        new_processor().save_pretrained(str(folder))
        filled = CARD.format(recipe=recipe, **figures, table="\n".join(table), torch=torch.__version__.split("+")[0])
        (folder / "README.md").write_text(filled, encoding="utf-8")
    print(f"mean IoU {found}")


if __name__ == "__main__":
    run_recipe(main, Pretraining())
