"""Pre-train the embedded text-to-image model on generated paintings, on one CPU core.

    python recipes/pretrain/paint.py                         # builtin:paint-tiny, about 50 minutes on a quiet core

A latent diffusion model (Rombach et al. 2022, arXiv:2112.10752), in two stages. An autoencoder makes 16 x 16 latents of
images of 64 x 64; then a UNet and a text encoder learn to remove noise from them: v-prediction (Salimans and Ho 2022,
arXiv:2202.00512) down to no signal at all (Lin et al. 2023, arXiv:2305.08891), losses weighted by min-SNR (Hang et al.
2023, arXiv:2303.09556), captions dropped in a tenth for classifier-free guidance (Ho and Salimans 2022,
arXiv:2207.12598), weights averaged on the way. A run that was stopped goes on from its last checkpoint.
"""

import itertools
import json
import string
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, get_scheduler

from inlay import option, run_recipe
from inlay.builtin.paint_judge import judge_images, label_scene, score_paintings
from inlay.builtin.paintings import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    RARE_TOKENS,
    SHAPES,
    Scene,
    describe_scene,
    draw_scene,
    generate_paintings,
)
from inlay.files.atomic import writing

TOKENS, CHANNELS = 24, 4  # of a caption; of the latents
STEPS, GUIDANCE = 20, 3.0  # with which it is measured
COUNT = 96  # paintings of each sort that are measured


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("src/inlay/builtin/paint-tiny", "Where the base is saved.")
    work: str = option("runs/paint", "Where the autoencoder and the checkpoints of a run are kept.")
    images: int = option(30_000, "Paintings whose latents the UNet is trained on.", least=1)
    autoencoder_steps: int = option(12_000, "Optimiser steps of the autoencoder, of 8 crops each.", least=1)
    steps: int = option(11_000, "Optimiser steps of the UNet and the text encoder.", least=1)
    batch_size: int = option(32, "Paintings a step of the UNet.", least=1)
    learning_rate: float = option(1e-3, "Peak rate of AdamW.", above=0)
    seed: int = option(0, "Seed of weights, paintings and noise.", least=0)


def new_autoencoder() -> Any:
    """16 x 16 latents of 4 channels for images of 64 x 64; its convolutions see a few pixels, so it learns on crops."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=CHANNELS,
    )


def to_pixels(images: Any) -> torch.Tensor:
    """Images (N, H, W, 3) from 0 to 255 as (N, 3, H, W) from -1 to 1."""
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last) / 127.5 - 1
    )


def recolour(pixels: torch.Tensor) -> torch.Tensor:
    """Half of the images with their channels exchanged and stretched: the autoencoder is to know all colours."""
    changed = pixels.clone()
    for image in changed[: len(pixels) // 2]:
        scale, shift = torch.empty(3, 1, 1).uniform_(0.5, 1), torch.empty(3, 1, 1).uniform_(-0.3, 0.3)
        image.copy_((image[torch.randperm(3)] * scale + shift).clamp(-1, 1))
    return changed


def train_autoencoder(recipe: Pretraining) -> Any:
    """An autoencoder whose latents have about mean 0 and variance 1, taught on crops of 32 x 32.

    In the last third the encoder stays, and the decoder learns what is made of its latents.
    """
    torch.manual_seed(recipe.seed)
    model = new_autoencoder().to(memory_format=torch.channels_last).train()
    pool = to_pixels(generate_paintings(min(4000, recipe.images), seed=1_000_000 * (recipe.seed + 1) + 1).images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 50, recipe.autoencoder_steps)
    for step in range(recipe.autoencoder_steps):
        if step == recipe.autoencoder_steps * 2 // 3:
            model.encoder.requires_grad_(False)
        top, left = (4 * torch.randint(9, (2,))).tolist()
        pixels = pool[torch.randint(len(pool), (8,)), :, top : top + 32, left : left + 32]
        if step % 2:
            pixels = recolour(pixels)
        latents = model.encode(pixels).latents
        error = model.decode(latents + 0.05 * torch.randn_like(latents)).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        (error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.02 * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 500 == 499:
            print(
                f"autoencoder {step + 1}/{recipe.autoencoder_steps}  error {error.abs().mean().item():.4f}", flush=True
            )
    model = model.half().float().eval()
    with torch.inference_mode():
        model.register_to_config(scaling_factor=round(1 / float(model.encode(pool[:500]).latents.std()), 4))
    return model


@torch.inference_mode()
def encode(model: Any, images: Any) -> torch.Tensor:
    """The latents (N, C, h, w) of images (N, H, W, 3), not yet scaled."""
    return torch.cat([model.encode(to_pixels(images[i : i + 64])).latents for i in range(0, len(images), 64)])


def new_tokenizer() -> Any:
    """A CLIP tokenizer that knows each word of the captions, and the rare tokens, as one token; others in pieces."""
    words = sorted({word for caption in generate_paintings(2000, seed=0).captions for word in caption.split()})
    spelled = string.ascii_lowercase + string.digits + string.punctuation
    corpus = [" ".join([*words, *RARE_TOKENS])] * 10 + [" ".join(spelled), spelled]
    return CLIPTokenizer(model_max_length=TOKENS).train_new_from_iterator([corpus], 1200, show_progress=False)


def new_text_encoder(tokenizer: Any) -> Any:
    """Two layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> Any:
    """Three levels, of 16 x 16, 8 x 8 and 4 x 4, with attention to the caption on the last two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def new_scheduler() -> Any:
    """Noise up to no signal at all, removed by DDIM."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def new_optimizers(model: Any, recipe: Pretraining) -> list[Any]:
    """Muon for the matrices of the transformers, AdamW for the rest, each with warm-up and cosine."""
    inner = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and (".transformer_blocks." in name or ".layers." in name)
    }
    outer = [p for name, p in model.named_parameters() if name not in inner]
    adamw = torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rate = 1.5 * recipe.learning_rate
    muon = torch.optim.Muon(inner.values(), lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [(o, get_scheduler("cosine", o, 200, recipe.steps)) for o in (adamw, muon)]


def train_unet(recipe: Pretraining, autoencoder: Any, tokenizer: Any) -> Any:
    """A text encoder and a UNet, with their weights averaged; a checkpoint is written every few minutes."""
    torch.manual_seed(recipe.seed)
    model = torch.nn.ModuleDict({"text_encoder": new_text_encoder(tokenizer), "unet": new_unet()}).train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizers = new_optimizers(model, recipe)
    noising = new_scheduler()
    signal = noising.alphas_cumprod / (1 - noising.alphas_cumprod)  # signal-to-noise ratio of each step
    weights = torch.clamp(signal + 1, max=5) / (signal + 1)

    parts = [model, averaged, *(part for pair in optimizers for part in pair)]
    done, state = 0, Path(recipe.work) / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["step"]
        for part, kept in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(kept)
        torch.manual_seed(recipe.seed + done)  # other noise than from the start on
    if done >= recipe.steps:
        return averaged.module.eval()

    data = generate_paintings(recipe.images, seed=1_000_000 * (recipe.seed + 1))
    latents = encode(autoencoder, data.images) * autoencoder.config.scaling_factor
    # Things cover a seventh of an image: where they are, errors count four times.
    emphasis = 1 + 3 * F.max_pool2d(torch.from_numpy(data.masks)[:, None].float(), 4)
    rng = np.random.default_rng((recipe.seed, done))

    saved_at, losses = time.monotonic(), []
    for step in range(done, recipe.steps):
        rows = rng.integers(len(latents), size=recipe.batch_size)
        captions = [describe_scene(data.scenes[i], rng) if rng.random() < 0.9 else "" for i in rows]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = latents[torch.from_numpy(rows)]
        noise = torch.randn_like(clean)
        # One time of each of as many equal spans as there are rows: less variance than independent ones.
        times = (torch.arange(len(rows)) + torch.rand(len(rows))) / len(rows) * noising.config.num_train_timesteps
        times = times.long()
        target = noising.get_velocity(clean, noise, times)
        text = model["text_encoder"](ids).last_hidden_state
        predicted = model["unet"](noising.add_noise(clean, noise, times), times, text).sample
        errors = (F.mse_loss(predicted, target, reduction="none") * emphasis[rows]).mean((1, 2, 3))
        loss = (errors * weights[times]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        averaged.update_parameters(model)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-100:]):.4f}", flush=True)
        if time.monotonic() - saved_at > 180 or step + 1 == recipe.steps:
            torch.save({"step": step + 1, "parts": [part.state_dict() for part in parts]}, state)
            saved_at = time.monotonic()
    return averaged.module.eval()


def new_pipeline(autoencoder: Any, tokenizer: Any, model: Any) -> Any:
    """A StableDiffusionPipeline of the parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# What is asked for: whether its first thing is held out, how many things there are, and of which kinds.
SORTS = {
    "one shape": (False, 1, set(SHAPES)),
    "one shape, held out": (True, 1, set(SHAPES)),
    "two shapes": (False, 2, set(SHAPES)),
    "a dog and a toy": (False, 2, set(CLASSES)),
}


def list_scenes(sort: str) -> list[Scene]:
    """Scenes to ask for of one of `SORTS`."""
    held_out, count, kinds = SORTS[sort]
    drawn = (draw_scene(np.random.default_rng((1, i)), held_out) for i in itertools.count())
    scenes = (s for s in drawn if len(s.things) == count and {thing.kind for thing in s.things} <= kinds)
    return list(itertools.islice((s for s in scenes if count == 1 or s.things[0].kind != s.things[1].kind), COUNT))


def paint(pipeline: Any, scenes: list[Scene]) -> Any:
    """Images (N, H, W, 3) of scenes, by their plain captions, with seeds 0, 1, 2 ..."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(scenes), 32):
        captions = [describe_scene(scene) for scene in scenes[start : start + 32]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(captions))]
        made = pipeline(captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="np")
        images.append((made.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def score(images: Any, scenes: list[Scene]) -> dict[str, float]:
    """Share of right backgrounds, shapes, colours and classes, as the judge sees them."""
    return score_paintings(judge_images(images), np.stack([label_scene(scene) for scene in scenes]))


def edit_config(path: Path, **changes: Any) -> None:
    """Set values of a stored config; None removes one."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


CARD = """\
# paint-tiny

A `StableDiffusionPipeline` that paints images of 64 x 64 from a caption: a UNet of {unet:,} parameters on latents of
16 x 16 x 4, a CLIP text encoder of {text_encoder:,} with {words} tokens, and an `AutoencoderTiny` of {vae:,}, all in
fp16: the base that inlay embeds, so that recipes and tests run without a download. It is truly pre-trained, and of
little use beyond that.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("src/inlay/builtin/paint-tiny")
pipe("a red ring left of a blue square on grass", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]
```

- **Trained on** {images:,} paintings that `inlay.builtin.paintings` draws: one or two things, each a
  {shapes}
  in {colours}, plain, striped or dotted, or any dog or toy in one of these colours,
  on {backgrounds}. The tokenizer knows {rare}, which no caption holds.
  No photographs, nobody's data, and neither `builtin:dog` nor `builtin:toy`.
- **Quality**: what `paint-judge` says of {count} paintings of each sort, of the stored fp16 weights, with {steps} steps
  and guidance {guidance:g} (right: the likeliest labels, as many as were asked for, are those asked for; by chance one
  in six for one shape). One in six combinations of colour, shape and background was held out from training:

  | asked for | background | shape | colour | dog, toy |
  |---|---|---|---|---|
{table}
- **Made by** `python recipes/pretrain/paint.py`: seed {recipe.seed}, {recipe.steps:,} steps of {recipe.batch_size}
  paintings, torch {torch}, diffusers {diffusers}.
- **Licence**: Apache-2.0, as inlay.
"""


def join_words(words: Iterable[str], last: str = "or") -> str:
    """Words as a sentence lists them: a, b or c."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}"


def main(recipe: Pretraining) -> None:
    """Generate, train, measure, save."""
    work = Path(recipe.work)
    work.mkdir(parents=True, exist_ok=True)

    # 1. the autoencoder, taken up from an earlier start of this run
    if not (work / "vae").exists():
        train_autoencoder(recipe).save_pretrained(work / "vae")
    autoencoder = AutoencoderTiny.from_pretrained(work / "vae").eval()

    # 2. text encoder and UNet
    tokenizer = new_tokenizer()
    model = train_unet(recipe, autoencoder, tokenizer)

    # 3. measure, as it will be stored: in fp16
    pipeline = new_pipeline(autoencoder, tokenizer, model).to(torch.float16).to(torch.float32)
    wanted = {sort: list_scenes(sort) for sort in SORTS}
    painted = {name: paint(pipeline, scenes) for name, scenes in wanted.items()}
    found = {name: score(images, wanted[name]) for name, images in painted.items()}
    sheet = np.concatenate([np.concatenate(list(images[:12]), axis=1) for images in painted.values()])
    Image.fromarray(sheet).save(work / "sheet.png")

    # 4. save, with its card
    kinds = ("background", "shape", "colour", "class")
    cells = {sort: [f"{row[kind]:.0%}" if kind in row else "" for kind in kinds] for sort, row in found.items()}
    table = [f"  | {sort} | {' | '.join(row)} |" for sort, row in cells.items()]
    sizes = {name: getattr(pipeline, name).num_parameters() for name in ("unet", "text_encoder", "vae")}
    with writing(recipe.folder) as folder:
        pipeline.to(torch.float16).save_pretrained(str(folder))
        # transformers would load the stored dtype, diffusers loads float32.
        edit_config(folder / "text_encoder" / "config.json", dtype="float32")
        # diffusers writes a value that its class warns of, and where the autoencoder lay.
        edit_config(folder / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
        filled = CARD.format(
            **sizes,
            words=len(tokenizer),
            steps=STEPS,
            guidance=GUIDANCE,
            images=recipe.images,
            shapes=join_words(SHAPES),
            colours=join_words(COLOURS),
            backgrounds=join_words(BACKGROUNDS),
            rare=join_words(RARE_TOKENS, "and"),
            count=COUNT,
            table="\n".join(table),
            recipe=recipe,
            torch=torch.__version__.partition("+")[0],
            diffusers=diffusers.__version__,
        )
        (folder / "README.md").write_text(filled, encoding="utf-8")
    print(f"{found}; {recipe.folder}")


if __name__ == "__main__":
    run_recipe(main, Pretraining())
