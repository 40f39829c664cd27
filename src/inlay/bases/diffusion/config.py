"""The config of a text-to-image base: what the files of a diffusers pipeline say, without its weights.

Nothing here imports diffusers or the models of transformers.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig

from inlay.errors import BadInput, DamagedFile, Unreachable, Unsupported
from inlay.files.bounded_json import parse_json

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*DENOISERS, *TEXT_ENCODERS, "vae")  # of a pipeline; what else it names is no part of the computation
# By the pipeline's class: how its parts work together is in `families`.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
MAX_BYTES = 1_000_000  # of one of these files, which have a few kB


@strict
class DiffusionConfig(PreTrainedConfig):
    """A pipeline of diffusers: its class, and the class and config of each part.

    Attributes:
        pipeline: Class of the pipeline, one of `PIPELINES`.
        parts: By name in `PARTS`: `library` (diffusers or transformers), `class` and `config`.
        scheduler: scheduler_config.json.
        settings: What else model_index.json says, such as `force_zeros_for_empty_prompt`.
    """

    model_type = "diffusion"

    pipeline: str = "StableDiffusionPipeline"
    parts: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None

    @property
    def denoiser(self) -> str:
        """Name of the part that predicts: `unet` or `transformer`."""
        return next(name for name in DENOISERS if name in (self.parts or {}))

    @property
    def text_encoders(self) -> list[str]:
        """Names of the text encoders that the pipeline has."""
        return [name for name in TEXT_ENCODERS if name in (self.parts or {})]

    @property
    def _denoiser_config(self) -> dict[str, Any]:
        return dict((self.parts or {})[self.denoiser]["config"])

    @property
    def num_hidden_layers(self) -> int | None:
        """Levels of a UNet, blocks of a transformer."""
        found = self._denoiser_config
        return len(found["block_out_channels"]) if "block_out_channels" in found else found.get("num_layers")

    @property
    def hidden_size(self) -> int | None:
        """Channels of a UNet where they are most, or the width of a transformer."""
        found = self._denoiser_config
        if "block_out_channels" in found:
            return max(found["block_out_channels"])
        heads, width = found.get("num_attention_heads"), found.get("attention_head_dim")
        return heads * width if heads and width else None

    @property
    def latent_scale(self) -> int:
        """Pixels a side of what becomes one latent."""
        found = (self.parts or {})["vae"]["config"]
        levels = found.get("block_out_channels") or found["decoder_block_out_channels"]  # the second of AutoencoderTiny
        return 2 ** (len(levels) - 1)

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that the denoiser was trained on."""
        return int(self._denoiser_config["sample_size"]) * self.latent_scale

    @property
    def latent_channels(self) -> int:
        """Numbers of one latent."""
        return int(self._denoiser_config["in_channels"])

    @property
    def predicts_flow(self) -> bool:
        """Whether image and noise are mixed along a straight line (flow matching)."""
        return "FlowMatch" in str((self.scheduler or {}).get("_class_name"))

    @property
    def train_timesteps(self) -> int:
        """Number of noise levels."""
        return int((self.scheduler or {}).get("num_train_timesteps", 1000))


def is_diffusion(config: Any) -> bool:
    """True for the config of a text-to-image base."""
    return isinstance(config, DiffusionConfig)


def is_pipeline_folder(where: str) -> bool:
    """True for a local folder that holds a pipeline of diffusers."""
    return (Path(where) / INDEX).is_file()


def is_pipeline_on_hub(where: str, revision: str | None) -> bool:
    """True for the Hub id of a pipeline; False for one of anything else, and where the Hub cannot be asked."""
    if Path(where).is_dir():
        return False
    try:
        hf_hub_download(where, INDEX, revision=revision)
    except (EntryNotFoundError, OSError, ValueError):
        return False
    return True


def read_diffusion_config(name: str, where: str, revision: str | None) -> DiffusionConfig:
    """The config of a pipeline in a folder or on the Hub.

    Args:
        name: For messages.
        where: Folder or Hub id.
        revision: Of a Hub id.

    Raises:
        InlayError: A pipeline of another class, files that are missing or cannot be read.
    """
    index = _read_json(where, INDEX, revision)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise Unsupported(f"{name} is a {pipeline} of diffusers; inlay adapts {', '.join(PIPELINES)}.")
    parts: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        library, kind = _read_class(name, part, index.get(part))
        if kind is not None:
            parts[part] = {
                "library": library,
                "class": kind,
                "config": _read_json(where, f"{part}/config.json", revision),
            }
    if "vae" not in parts or not any(denoiser in parts for denoiser in DENOISERS) or "text_encoder" not in parts:
        raise BadInput(f"the pipeline {name} lacks its {'vae' if 'vae' not in parts else 'denoiser or text encoder'}.")
    for part in DENOISERS:
        if part in parts and not isinstance(parts[part]["config"].get("sample_size"), int):
            raise Unsupported(f"the {part} of {name} does not say the size of its images (sample_size); add it.")
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    return DiffusionConfig(
        pipeline=pipeline, parts=parts, scheduler=_read_json(where, SCHEDULER, revision), settings=settings
    )


def _read_class(name: str, part: str, entry: Any) -> tuple[str | None, str | None]:
    """Library and class of a part, as model_index.json has them; None for a part that a pipeline is without."""
    if entry is None or entry == [None, None]:
        return None, None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        raise DamagedFile(f"{INDEX} of {name} does not name the class of its {part}; download it again.")
    library, kind = entry
    if library not in ("diffusers", "transformers"):
        raise Unsupported(f"the {part} of {name} needs code of {library}, which inlay never runs.")
    return library, kind


def _read_json(where: str, file: str, revision: str | None) -> dict[str, Any]:
    try:
        path = Path(where) / file if Path(where).is_dir() else Path(hf_hub_download(where, file, revision=revision))
    except LocalEntryNotFoundError:
        raise Unreachable(
            f"{file} of {where} is not in the cache and the Hub cannot be reached; check the network, or give a folder "
            "of the pipeline."
        ) from None
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise DamagedFile(f"{file} of {where} cannot be read ({error}); download the pipeline again.") from None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{file} of {where} cannot be read ({error}); download the pipeline again.") from None
    if not isinstance(found, dict):
        raise DamagedFile(f"{file} of {where} must hold a JSON object, not a {type(found).__name__}.")
    return found


AutoConfig.register(DiffusionConfig.model_type, DiffusionConfig, exist_ok=True)
