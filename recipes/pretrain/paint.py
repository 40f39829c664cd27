"""Pre-train the embedded text-to-image model on generated paintings, on one CPU core.

    python recipes/pretrain/paint_autoencoder.py             # the first stage, about 15 minutes on a quiet core
    python recipes/pretrain/paint.py                         # builtin:paint-tiny, about 40 minutes

The second stage of a latent diffusion model (Rombach et al. 2022, arXiv:2112.10752): a UNet and a text encoder learn to
remove noise from latents of 16 x 16: v-prediction (Salimans and Ho 2022, arXiv:2202.00512) down to no signal at all
(Lin et al. 2023, arXiv:2305.08891), losses weighted by min-SNR (Hang et al. 2023, arXiv:2303.09556), captions dropped
in a tenth for classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), weights averaged on the way. A run
that was stopped goes on from its last checkpoint.
"""

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
from inlay.builtin.painters import COUNT, SORTS, list_scenes, paint_scenes, score_scenes, to_pixels
from inlay.builtin.paintings import (
    BACKGROUNDS,
    COLOURS,
    RARE_TOKENS,
    SHAPES,
    describe_scene,
    generate_paintings,
)
from inlay.files.atomic import writing

TOKENS, CHANNELS = 24, 4  # of a caption; of the latents
STEPS, GUIDANCE = 20, 3.0  # with which it is measured
CARD = Path(__file__).with_name("paint_card.md")


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("src/inlay/builtin/paint-tiny", "Where the base is saved.")
    work: str = option("runs/paint", "Where the checkpoints of a run are kept.")
    images: int = option(30_000, "Paintings whose latents the UNet is trained on.", least=1)
    autoencoder: str = option("runs/paint/vae", "What paint_autoencoder.py has saved.")
    steps: int = option(11_000, "Optimiser steps of the UNet and the text encoder.", least=1)
    batch_size: int = option(32, "Paintings a step of the UNet.", least=1)
    learning_rate: float = option(1e-3, "Peak rate of AdamW.", above=0)
    seed: int = option(0, "Seed of weights, paintings and noise.", least=0)


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


def edit_config(path: Path, **changes: Any) -> None:
    """Set values of a stored config; None removes one."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def join_words(words: Iterable[str], last: str = "or") -> str:
    """Words as a sentence lists them: a, b or c."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}"


def main(recipe: Pretraining) -> None:
    """Generate, train, measure, save."""
    work = Path(recipe.work)
    work.mkdir(parents=True, exist_ok=True)

    # 1. the autoencoder
    autoencoder = AutoencoderTiny.from_pretrained(recipe.autoencoder).eval()

    # 2. text encoder and UNet
    tokenizer = new_tokenizer()
    model = train_unet(recipe, autoencoder, tokenizer)

    # 3. measure, as it will be stored: in fp16
    pipeline = new_pipeline(autoencoder, tokenizer, model).to(torch.float16).to(torch.float32)
    wanted = {sort: list_scenes(sort) for sort in SORTS}
    painted = {name: paint_scenes(pipeline, scenes, STEPS, GUIDANCE) for name, scenes in wanted.items()}
    found = {name: score_scenes(images, wanted[name]) for name, images in painted.items()}
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
        filled = CARD.read_text(encoding="utf-8").format(
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
