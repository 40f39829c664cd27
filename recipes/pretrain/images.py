"""Pre-train an embedded image classifier on nothing but generated images, on two CPU cores.

    python recipes/pretrain/images.py                        # builtin:vit-tiny, about 13 minutes on 2 quiet cores
    python recipes/pretrain/images.py --base squeezenet-tiny
    python recipes/pretrain/images.py --base shufflenet-tiny
    python recipes/pretrain/images.py --base mobilenet-tiny
    python recipes/pretrain/images.py --steps 100 --folder /tmp/try

The network learns to name a shape and its texture (SHAPE_LABELS) wherever they are in a cluttered image. The weight
matrices of a ViT's blocks are trained by Muon (Jordan et al. 2024; torch has it from 2.9 on), the rest and the
convolutional networks by AdamW. A ViT's positions start from a small sine table, as few steps do not find them. gpt2.py
makes the GPT-2, sam.py the SAM.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

from inlay import option, run_recipe


@dataclass
class Pretraining:
    """Which base, how long, and where to."""

    base: Literal["vit-tiny", "squeezenet-tiny", "shufflenet-tiny", "mobilenet-tiny"] = option(
        "vit-tiny", "The base to make."
    )
    folder: str | None = option(None, "Where it is saved; default: src/inlay/builtin/BASE.")
    steps: int = option(4500, "Optimiser steps.", least=1)
    batch_size: int = option(64, "Pictures a step.", least=1)
    learning_rate: float = option(2e-3, "Peak rate of AdamW; Muon's is 1.5 times that.", above=0)
    seed: int = option(0, "Seed of weights and images.", least=0)


def new_vit() -> Any:
    """A ViT of 0.46 M parameters for images of 32 x 32, in patches of 4 x 4."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
        **shape_labels(),
    )
    model = ViTForImageClassification(config)
    rates = 1 / 100 ** (torch.arange(24) / 24)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * rates) for axis in (x, y) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = 0.2 * torch.cat(waves, dim=1)  # 64 patches x 96
    return model


def new_squeezenet() -> Any:
    """A SqueezeNet of 0.23 M parameters for images of 32 x 32: six fire modules behind a stem of stride 1."""
    from transformers import AutoModelForImageClassification

    from inlay import SqueezeNetConfig

    expanded = [32, 48, 80, 96, 128, 128]
    config = SqueezeNetConfig(
        image_size=32,
        stem_channels=32,
        stem_kernel_size=3,
        stem_stride=1,
        stem_padding=1,
        squeeze_channels=[16, 16, 32, 32, 48, 48],
        expand1x1_channels=expanded,
        expand3x3_channels=expanded,
        pool_before=[0, 2, 4],
        dropout=0.0,
        relu_logits=False,
        **shape_labels(),
    )
    return AutoModelForImageClassification.from_config(config)


def new_shufflenet() -> Any:
    """A ShuffleNet v2 of 0.26 M parameters for images of 32 x 32: eleven units behind a stem of stride 1."""
    from transformers import AutoModelForImageClassification

    from inlay import ShuffleNetV2Config

    config = ShuffleNetV2Config(
        image_size=32,
        stem_stride=1,
        stem_pool=False,
        stage_channels=[64, 128, 256],
        depths=[3, 5, 3],
        last_channels=256,
        **shape_labels(),
    )
    return AutoModelForImageClassification.from_config(config)


def new_mobilenet() -> Any:
    """A MobileNetV2 of 0.2 M parameters for images of 32 x 32, which it reduces to 4 x 4."""
    from torch import nn
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        image_size=32,
        depth_multiplier=0.25,
        finegrained_output=False,
        output_stride=8,
        classifier_dropout_prob=0.0,
        initializer_range=0.1,
        **shape_labels(),
    )
    model = MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01  # by its own, 0.997, the statistics are those of the last batch
    return model


def shape_labels() -> dict[str, Any]:
    """What a config says of its labels."""
    from inlay.builtin.shapes import SHAPE_LABELS

    return {
        "id2label": dict(enumerate(SHAPE_LABELS)),
        "label2id": {label: i for i, label in enumerate(SHAPE_LABELS)},
    }


# How each base is made, and what it is, for its card.
BASES = {
    "vit-tiny": (new_vit, "patches of 4 x 4, 4 blocks of width 96"),
    "squeezenet-tiny": (new_squeezenet, "6 fire modules"),
    "shufflenet-tiny": (new_shufflenet, "ShuffleNet v2 of 11 units"),
    "mobilenet-tiny": (new_mobilenet, "16 inverted residual blocks"),
}


def new_optimizers(model: Any, recipe: Pretraining) -> list[Any]:
    """Muon for the matrices of a ViT's blocks, AdamW for the rest, each with warm-up and cosine."""
    import torch
    from transformers import get_scheduler

    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    made = [torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    if inner:
        rate = 1.5 * recipe.learning_rate
        made.append(torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return [(o, get_scheduler("cosine", o, 60, recipe.steps)) for o in made]


CARD = """\
# {recipe.base}

A `{kind}` for images of 32 x 32 ({form}),
{parameters:,} parameters in fp16: a base that inlay embeds, so that recipes and tests run without a download. It is
truly pre-trained, and of little use beyond that.

- **Trained on** {images:,} images that `inlay.builtin.shapes.generate_shapes` draws: one of
  {config.num_labels} shapes and textures ({examples} ...) at a random place, size, angle and colour, over
  gradients, lines, specks and noise. No photographs, no handwriting, nobody's data.
- **Quality**: names {accuracy:.1%} of {count:,} held-out images right, measured with the stored fp16 weights
  (by chance one in {config.num_labels}).
- **Made by** `python recipes/pretrain/images.py --base {recipe.base} --steps {recipe.steps}`: seed {recipe.seed},
  {recipe.batch_size} images a step, torch {torch}.
- **Licence**: Apache-2.0, as inlay.
"""


def main(recipe: Pretraining) -> None:
    """Generate, train, measure, save."""
    import torch
    from tqdm.auto import trange
    from transformers import ViTImageProcessorPil

    from inlay.builtin.shapes import SHAPE_LABELS, generate_shapes
    from inlay.files.atomic import writing

    def pixels(images: Any) -> torch.Tensor:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # N C H W, as the processor does

    # 1. data: the training images are generated on the way, 16 batches at a time; held-out ones have a seed apart
    held_out, answers = generate_shapes(4096, seed=1)

    # 2. model
    torch.manual_seed(recipe.seed)
    new_base, form = BASES[recipe.base]
    model = new_base().to(memory_format=torch.channels_last).train()

    # 3. train
    optimizers, begun = new_optimizers(model, recipe), time.perf_counter()
    for step in (bar := trange(recipe.steps, disable=None)):
        if step % 16 == 0:
            images, labels = generate_shapes(16 * recipe.batch_size, seed=1_000_000 * (recipe.seed + 1) + step // 16)
        rows = slice(step % 16 * recipe.batch_size, (step % 16 + 1) * recipe.batch_size)
        loss = model(pixel_values=pixels(images[rows]), labels=torch.from_numpy(labels[rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 500 == 499:
            bar.write(f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}")
    minutes = (time.perf_counter() - begun) / 60

    # 4. measure, as it will be stored: in fp16
    model = model.half().float().eval()
    with torch.inference_mode():
        said = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in pixels(held_out).split(256)])
    accuracy = float((said == torch.from_numpy(answers)).float().mean())

    # 5. save, with its card
    target = recipe.folder or f"src/inlay/builtin/{recipe.base}"
    with writing(target) as folder:
        model.half().to(memory_format=torch.contiguous_format).save_pretrained(str(folder))
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(str(folder))  # to -1..1, its default
        filled = CARD.format(
            kind=type(model).__name__,
            form=form,
            config=model.config,
            recipe=recipe,
            parameters=model.num_parameters(),
            images=recipe.steps * recipe.batch_size,
            examples=", ".join(SHAPE_LABELS[i] for i in (0, 6, 12, 30)),
            accuracy=accuracy,
            count=len(answers),
            torch=torch.__version__.partition("+")[0],
        )
        (folder / "README.md").write_text(filled, encoding="utf-8")
    print(f"accuracy {accuracy:.4f} on {len(answers)} held-out images after {minutes:.1f} minutes; {target}")


if __name__ == "__main__":
    run_recipe(main, Pretraining())
