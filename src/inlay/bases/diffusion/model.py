"""A pipeline of diffusers as one model of transformers: what is adapted, checked, merged and saved."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from inlay.bases.diffusion.config import DiffusionConfig
from inlay.bases.diffusion.families import FAMILIES
from inlay.bases.diffusion.tokenizers import load_tokenizers
from inlay.errors import BadInput, Unsupported


@dataclass
class DiffusionOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: Mean square of prediction - target.
        prediction: Of the denoiser, (B, c, h, w).
        target: What it should have been: noise, velocity, image or flow, as the scheduler's `prediction_type` says.
        alphas_cumprod: Share of the image in the variance of each noisy latent, (B,); None for flow matching.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None
    target: Tensor | None = None
    alphas_cumprod: Tensor | None = None


class DiffusionModel(PreTrainedModel):
    """Denoiser, text encoders and VAE of a pipeline as modules under the names that they have there.

    So LoRA of `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` is saved under the name that diffusers
    and its users give it. The VAE is never trained.
    """

    config_class = DiffusionConfig
    config: DiffusionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    alphas_cumprod: Tensor

    def __init__(self, config: DiffusionConfig, parts: dict[str, nn.Module] | None = None) -> None:
        super().__init__(config)
        for name, part in (parts or {name: _make_part(entry) for name, entry in (config.parts or {}).items()}).items():
            setattr(self, name, part)
        self.register_buffer("alphas_cumprod", _compute_schedule(config), persistent=False)

    @property
    def denoiser(self) -> Any:
        """The part that predicts."""
        return getattr(self, self.config.denoiser)

    def _init_weights(self, module: nn.Module) -> None:
        """Each part draws its own."""

    @classmethod
    def from_pretrained(cls, where: Any, *args: Any, **options: Any) -> Any:
        """Load every part by the class of its own, as `AutoModel.from_pretrained` calls it.

        Takes config, dtype, revision, use_safetensors and output_loading_info; other options have no meaning for a
        pipeline.
        """
        config, dtype, report = options["config"], options.get("dtype"), _new_report()
        parts: dict[str, nn.Module] = {}
        for name, entry in config.parts.items():
            place = {"revision": options.get("revision"), "use_safetensors": options.get("use_safetensors", True)}
            key = "dtype" if entry["library"] == "transformers" else "torch_dtype"
            part, found = _find_class(entry).from_pretrained(
                where, subfolder=name, output_loading_info=True, **{key: dtype}, **place
            )
            for what in report:
                report[what] += [_put_in_front(name, missed) for missed in found.get(what) or []]
            parts[name] = part
        model = cls(config, parts)
        model.source = (where, options.get("revision"))
        return (model, report) if options.get("output_loading_info") else model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write a folder that diffusers loads as a pipeline, with its tokenizers and scheduler.

        Whatever the weights are stored in, diffusers loads its own parts in float32 unless it is told otherwise; the
        configs of the text encoders ask for the same, so that all parts compute together.
        """
        with _without_notes_on_absent_parts():
            self.make_pipeline().save_pretrained(save_directory)
        for name in self.config.text_encoders:
            path = Path(save_directory) / name / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")

    def make_pipeline(self) -> Any:
        """The pipeline of diffusers around these very modules; adapters in them take part.

        A safety checker and what else it may hold next to `PARTS` are left out.
        """
        kind = getattr(_import_diffusers(), self.config.pipeline)
        held = {name: getattr(self, name) for name in self.config.parts or {}}
        if "safety_checker" in kind._optional_components:
            held |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        others = {name: None for name in kind._optional_components if name not in held}
        for name in ("text_encoder_3", "tokenizer_3"):
            if self.config.pipeline == "StableDiffusion3Pipeline" and name not in held:
                others[name] = None
        return kind(**{**others, **held, **self.load_tokenizers(), "scheduler": self.load_scheduler()})

    def load_tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder, by its name in the pipeline."""
        where, revision = self.source
        return load_tokenizers(where, self.config.text_encoders, revision)

    def load_scheduler(self) -> Any:
        """The pipeline's own scheduler, for painting."""
        diffusers, settings = _import_diffusers(), self.config.scheduler or {}
        kind = getattr(diffusers, str(settings.get("_class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise Unsupported(f"diffusers has no scheduler {settings.get('_class_name')!r}; is it too old?")
        return cast(Any, kind).from_config(settings)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (B, c, h, w) of images (B, 3, H, W) from -1 to 1: the mean of what the VAE says of them.

        The VAE computes in the type of its weights also under autocast: that of SDXL overflows in float16.
        """
        device = "cpu" if pixels.is_meta else pixels.device.type  # the meta device has no autocast
        with torch.no_grad(), torch.autocast(device, enabled=False):
            found = self.vae.encode(pixels.to(self.vae.dtype))
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        settings = self.vae.config
        return (latents - (getattr(settings, "shift_factor", None) or 0.0)) * settings.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) from -1 to 1 of latents (B, c, h, w), in the type of the VAE's weights."""
        settings = self.vae.config
        latents = latents / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0.0)
        return cast(Tensor, self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0])

    def draw_timesteps(self, count: int) -> Tensor:
        """Noise levels (count,) to train at, from 0 (nearly the image) up."""
        spread = FAMILIES[self.config.pipeline].spread_timesteps(count)
        return (spread * self.config.train_timesteps).long().clamp_max(self.config.train_timesteps - 1)

    def forward(
        self,
        pixel_values: Tensor,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        **tokens: Tensor,
    ) -> DiffusionOutput:
        """Put noise on images, and predict what it was from them and their prompts.

        Args:
            pixel_values: (B, 3, H, W) from -1 to 1.
            timesteps: Noise level of each image (B,), from 0 up; default: drawn from torch's global generator.
            noise: (B, c, h, w), of the size of the latents; default: drawn from it, too.
            tokens: `input_ids` (B, N) of the prompts; of further text encoders `input_ids_2` and `input_ids_3`.

        Raises:
            InlayError: Tokens for a text encoder that the pipeline does not have, or none for one that it has.
        """
        latents = self.encode_images(pixel_values)
        noise = torch.randn_like(latents) if noise is None else noise.to(latents)
        timesteps = self.draw_timesteps(len(latents)) if timesteps is None else timesteps
        timesteps = timesteps.to(latents.device)
        conditions = FAMILIES[self.config.pipeline].encode(self, self._name_tokens(tokens), pixel_values.shape[-2:])
        if self.config.predicts_flow:
            noisy, target, level, share = self._mix_along_line(latents, noise, timesteps)
        else:
            noisy, target, level, share = self._mix_by_variance(latents, noise, timesteps)
        inputs = {"hidden_states" if self.config.denoiser == "transformer" else "sample": noisy, "timestep": level}
        prediction = self.denoiser(**inputs, **conditions, return_dict=False)[0]
        loss = mse_loss(prediction.float(), target.float())
        return DiffusionOutput(loss=loss, prediction=prediction, target=target, alphas_cumprod=share)

    def _name_tokens(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens by the name of the text encoder that reads them."""
        named = {name.replace("input_ids", "text_encoder"): value for name, value in tokens.items()}
        if set(named) != set(self.config.text_encoders):
            wanted = [name.replace("text_encoder", "input_ids") for name in self.config.text_encoders]
            raise BadInput(f"this pipeline takes {', '.join(wanted)} of a prompt, got {', '.join(tokens) or 'none'}.")
        return named

    def _mix_by_variance(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """Ho et al. 2020, arXiv:2006.11239, equation 4; velocities as in Salimans & Ho 2022, arXiv:2202.00512."""
        share = self.alphas_cumprod[timesteps].to(latents)  # B
        image, other = share.sqrt()[:, None, None, None], (1 - share).sqrt()[:, None, None, None]
        targets = {
            "epsilon": noise,
            "v_prediction": image * noise - other * latents,
            "sample": latents,
        }
        kind = str((self.config.scheduler or {}).get("prediction_type", "epsilon"))
        if kind not in targets:
            raise Unsupported(f"the scheduler predicts {kind!r}; inlay trains {', '.join(targets)}.")
        return image * latents + other * noise, targets[kind], timesteps, share

    def _mix_along_line(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Any, ...]:
        """Lipman et al. 2023, arXiv:2210.02747; levels are shifted as the scheduler shifts them (arXiv:2403.03206)."""
        steps, shift = self.config.train_timesteps, float((self.config.scheduler or {}).get("shift", 1.0))
        sigma = (timesteps + 1).to(latents) / steps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        of_noise = sigma[:, None, None, None]
        return (1 - of_noise) * latents + of_noise * noise, noise - latents, sigma * steps, None


@contextmanager
def _without_notes_on_absent_parts() -> Iterator[None]:
    """Keep diffusers from telling that what a pipeline is without, such as T5, cannot be saved."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(_tells_more_than_absence)
    try:
        yield
    finally:
        logger.removeFilter(_tells_more_than_absence)


def _tells_more_than_absence(record: logging.LogRecord) -> bool:
    return "=None of type" not in str(record.msg)


def _import_diffusers() -> Any:
    """The library, which is an extra.

    Raises:
        InlayError: It is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise Unsupported("text-to-image pipelines need diffusers: pip install 'inlay[diffusion]'.") from None
    return diffusers


def _new_report() -> dict[str, list[Any]]:
    return {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def _put_in_front(part: str, found: Any) -> Any:
    """The name of a weight within the whole; of a mismatch, which has shapes too, its first entry."""
    return f"{part}.{found}" if isinstance(found, str) else (f"{part}.{found[0]}", *found[1:])


def _find_class(entry: dict[str, Any]) -> Any:
    """The class of a part: a model of diffusers or transformers, and nothing else that they export."""
    diffusers = _import_diffusers()
    library = diffusers if entry["library"] == "diffusers" else transformers
    kind = getattr(library, str(entry["class"]), None)
    if not (isinstance(kind, type) and issubclass(kind, (diffusers.ModelMixin, PreTrainedModel))):
        raise Unsupported(f"{entry['library']} has no model {entry['class']!r}; is it too old?")
    return kind


def _make_part(entry: dict[str, Any]) -> nn.Module:
    """A part with new weights, by its config."""
    kind = _find_class(entry)
    if entry["library"] == "transformers":
        return cast(nn.Module, kind(kind.config_class(**entry["config"])))
    return cast(nn.Module, kind.from_config(entry["config"]))


def _compute_schedule(config: DiffusionConfig) -> Tensor:
    """Share of the image in the variance at each noise level, (T,), as the scheduler of training has it."""
    if config.predicts_flow:
        return torch.zeros(0)
    with torch.device("cpu"):  # also where the model itself is made on the meta device
        return _import_diffusers().DDPMScheduler.from_config(config.scheduler or {}).alphas_cumprod.float()


AutoModel.register(DiffusionConfig, DiffusionModel, exist_ok=True)
