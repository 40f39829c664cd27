"""Pre-train the embedded judge of paintings, on one CPU core.

    python recipes/pretrain/paint_judge.py                   # builtin:paint-judge, about 8 minutes on a quiet core

A small ResNet (He et al. 2015, arXiv:1512.03385) that says of an image which background, shapes and colours it shows,
and whether it shows the embedded dog or toy. It learns on generated paintings, some of them with noise, blur, JPEG's
errors or those of the autoencoder of paint-tiny; it never sees what that model paints.
"""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageFilter
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil, get_scheduler

from inlay import option, run_recipe
from inlay.builtin.paint_judge import LABELS, judge_images, label_scene, score_paintings
from inlay.builtin.paintings import CLASSES, SUBJECTS, Dog, Thing, Toy, draw_scene, paint_scene
from inlay.files.atomic import writing


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("src/inlay/builtin/paint-judge", "Where the judge is saved.")
    autoencoder: str | None = option(
        "src/inlay/builtin/paint-tiny/vae", "Folder of an AutoencoderTiny; half of the images go through it."
    )
    images: int = option(12_000, "Paintings to learn from.", least=1)
    steps: int = option(2000, "Optimiser steps.", least=1)
    batch_size: int = option(48, "Paintings a step.", least=1)
    learning_rate: float = option(4e-3, "Peak rate of AdamW.", above=0)
    seed: int = option(0, "Seed of weights and paintings.", least=0)


def new_model() -> Any:
    """A ResNet of 0.2 M parameters for images of 64 x 64."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 96],
            depths=[1, 1, 1],
            layer_type="basic",
            problem_type="multi_label_classification",
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
    )


def draw_examples(count: int, seed: int) -> tuple[Any, Any]:
    """Images (N, H, W, 3) and labels (N, L); half show a subject, or a dog or toy that resembles it."""
    images, labels = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        scene, looks = draw_scene(rng), {}
        if rng.random() < 0.6 and not any(thing.kind in CLASSES for thing in scene.things):
            first = Thing(str(rng.choice(CLASSES)), scene.things[0].colour)
            scene = replace(scene, things=(first, *scene.things[1:]))
        for name in CLASSES:
            chance = rng.random()
            if chance < 0.4:
                looks[name] = SUBJECTS[name]
            elif chance < 0.6:
                looks[name] = resemble(name, rng)
        images.append(paint_scene(scene, rng, looks=looks))
        labels.append(label_scene(scene, looks))
    return np.stack(images), np.stack(labels)


def resemble(name: str, rng: np.random.Generator) -> Any:
    """A dog or toy with the subject's marks but other colours, or with its colour but none of its marks."""
    subject = SUBJECTS[name]
    colours = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(4)]
    if isinstance(subject, Dog):
        if rng.random() < 0.5:
            return replace(subject, coat=colours[0], ear=colours[1], patch=colours[2], collar=colours[3])
        return Dog(subject.coat, rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.55), "pointed")
    if rng.random() < 0.5:
        return replace(subject, body=colours[0], limbs=colours[1], belly=colours[2])
    return Toy(subject.body, rng.uniform(0.35, 0.6), antennas=int(rng.integers(0, 3)), eyes=2)


def spoil(image: Any, rng: np.random.Generator) -> Any:
    """An image (H, W, 3) with noise, blur or JPEG's errors, or none."""
    how = rng.integers(5)
    if how == 0:
        return np.clip(image + rng.normal(0, rng.uniform(4, 20), image.shape), 0, 255).astype(np.uint8)
    if how == 1:
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1))))
    if how == 2:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(40, 90)))
        return np.asarray(Image.open(file))
    return image


CARD = """\
# paint-judge

A `ResNetForImageClassification` for images of 64 x 64, {parameters:,} parameters in fp16: the judge of paintings that
inlay embeds. It says which background, shapes and colours an image shows, whether it shows a dog or a toy, and whether
that is the embedded dog (`builtin:dog`) or toy (`builtin:toy`). It has never seen what `paint-tiny` paints.

- **Trained on** {images:,} paintings that `inlay.builtin.paintings` draws, many with the embedded subjects, or with
  dogs and toys that resemble them; some with noise, blur or JPEG's errors, half through the autoencoder of
  `paint-tiny`.
- **Quality** on {count:,} held-out paintings, half of them through that autoencoder, measured with the stored fp16
  weights (right: the likeliest labels, as many as the painting has, are its own; dog, toy: the subject's probability is
  over a half just where it is shown):

  | background | shape | colour | dog | toy |
  |---|---|---|---|---|
  | {background:.1%} | {shape:.1%} | {colour:.1%} | {dog:.1%} | {toy:.1%} |
- **Made by** `python recipes/pretrain/paint_judge.py`: seed {recipe.seed}, {recipe.steps:,} steps of
  {recipe.batch_size} paintings, torch {torch}.
- **Licence**: Apache-2.0, as inlay.
"""


def main(recipe: Pretraining) -> None:
    """Generate, train, measure, save."""

    @torch.inference_mode()
    def blur_by_autoencoder(images: Any) -> Any:
        """Every second image as the autoencoder gives it back."""
        changed = images.copy()
        if recipe.autoencoder:
            pixels = torch.from_numpy(images[::2]).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = torch.cat([autoencoder(part).sample for part in pixels.split(64)]).clamp(-1, 1)
            changed[::2] = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return changed

    # 1. data: held-out paintings have a seed apart
    autoencoder: Any = AutoencoderTiny.from_pretrained(recipe.autoencoder).eval() if recipe.autoencoder else None
    images, labels = draw_examples(recipe.images, seed=1_000_000 * (recipe.seed + 1))
    images = blur_by_autoencoder(images)
    held_out, answers = draw_examples(1024, seed=1)
    held_out = blur_by_autoencoder(held_out)

    # 2. model
    torch.manual_seed(recipe.seed)
    model = new_model().to(memory_format=torch.channels_last).train()

    # 3. train
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, 50, recipe.steps)
    rng = np.random.default_rng(recipe.seed)
    for step in range(recipe.steps):
        rows = rng.integers(len(images), size=recipe.batch_size)
        spoiled = np.stack([spoil(image, rng) for image in images[rows]])
        pixels = torch.from_numpy(spoiled).permute(0, 3, 1, 2).float() / 127.5 - 1
        loss = model(pixel_values=pixels, labels=torch.from_numpy(labels[rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}/{recipe.steps}  loss {loss.item():.4f}", flush=True)

    # 4. measure, as it will be stored: in fp16
    model = model.half().float().eval()
    scores = score_paintings(judge_images(held_out, model), answers)

    # 5. save, with its card
    with writing(recipe.folder) as folder:
        model.half().to(memory_format=torch.contiguous_format).save_pretrained(str(folder))
        ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(str(folder))  # to -1..1, its default
        filled = CARD.format(
            parameters=model.num_parameters(),
            images=recipe.images,
            count=len(answers),
            recipe=recipe,
            torch=torch.__version__.partition("+")[0],
            **scores,
        )
        (folder / "README.md").write_text(filled, encoding="utf-8")
    print(f"right {scores} of {len(answers)} held-out paintings; {recipe.folder}")


if __name__ == "__main__":
    run_recipe(main, Pretraining())
