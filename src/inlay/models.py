"""Load a frozen base model, and its image processor, by name: `builtin:`, a local folder or a Hub id."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from inlay._peft import mirror_convolutions
from inlay.arch import head_modules
from inlay.errors import InlayError

Dtype = Literal["float32", "bfloat16", "float16"]
Bits = Literal[4, 8]
BUILTIN = Path(__file__).parent / "builtin"


def builtin_names() -> list[str]:
    """The embedded bases, as `builtin:` names."""
    return sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/config.json"))


def resolve(name: str) -> str:
    """The folder of an embedded or local model; a Hub id is returned as it is.

    Raises:
        InlayError: No embedded model of that name, a folder that holds no model, or neither folder nor Hub id.
    """
    if name.startswith("builtin:"):
        if name not in builtin_names():
            raise InlayError(f"there is no embedded model {name!r}; there are {', '.join(builtin_names())}.")
        return str(BUILTIN / name.removeprefix("builtin:"))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InlayError(f"expected a model folder with config.json, but {name} has none.")
        return str(path)
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise InlayError(f"no model folder at {name!r}; give a folder, a Hub id (user/name) or {builtin_names()[0]}.")
    return name


def load_base(
    name: str,
    *,
    labels: Sequence[str] | None = None,
    dtype: Dtype = "float32",
    bits: Bits | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load an image classifier with all its weights frozen.

    Args:
        name: `builtin:vit-tiny`, a local folder, or a Hub id of any AutoModelForImageClassification.
        labels: Class names. If they are not the base's own, the head is new: of this size, drawn from torch's global
            generator (seed it before).
        dtype: Of the weights; under `bits`, of those that are not quantised.
        bits: 8 (LLM.int8) or 4 (NF4) for the linear layers outside the head, through bitsandbytes.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The model in eval mode, no parameter requiring a gradient; `model.name_or_path` is `name`.

    Raises:
        InlayError: Unknown name, no network, weights that are not safetensors or do not fit their own config, a
            model that is no image classifier, bitsandbytes missing.
    """
    where, options = resolve(name), dict[str, Any]()
    if bits is not None:
        options["quantization_config"] = _quantization(bits, where, revision, dtype)
    config = _config(name, where, revision)
    own = [config.id2label[i] for i in sorted(config.id2label)]
    new_head = labels is not None and list(labels) != own
    if new_head and labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    before = logging.getLogger("transformers.modeling_utils").level
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # its report of a new head; ours is below
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            where,
            config=config,
            dtype=getattr(torch, dtype),
            revision=revision,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _explained(name, error) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise InlayError(f"the weights of {name} are not a whole safetensors file ({error}).") from None
        raise
    finally:
        logging.getLogger("transformers.modeling_utils").setLevel(before)
    _check_report(name, model, report, new_head)
    if new_head:
        _draw_head(model)
    mirror_convolutions()
    model.name_or_path = model.config._name_or_path = name
    return model.requires_grad_(False).eval()


def load_processor(name: str, revision: str | None = None) -> BaseImageProcessor:
    """The image processor of a base, in its Pillow version: the same pixels with and without torchvision.

    A base without preprocessor_config.json gets its model type's standard processor, at the size its config names.
    """
    where = resolve(name)
    try:
        return AutoImageProcessor.from_pretrained(where, revision=revision, backend="pil")
    except (OSError, ValueError) as error:
        config = _config(name, where, revision)
        kind = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {}).get("pil")
        if kind is None:
            raise InlayError(
                f"{name} names no image processor, and {config.model_type} has no standard one."
            ) from error
    processor = processor_from({"image_processor_type": kind.removesuffix("Pil")})
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        if getattr(processor, "crop_size", None):
            processor.size = {"shortest_edge": round(side * 256 / 224)}
            processor.crop_size = {"height": side, "width": side}
        else:
            processor.size = {"height": side, "width": side}
    return processor


def processor_from(settings: dict[str, Any]) -> BaseImageProcessor:
    """Rebuild an image processor from its `to_dict`.

    Raises:
        InlayError: The named class is not one of transformers' image processors.
    """
    import transformers

    kind = str(settings.get("image_processor_type", "")) + "Pil"
    if not any(kind == known.get("pil") for known in IMAGE_PROCESSOR_MAPPING_NAMES.values()):
        raise InlayError(f"unknown image processor {settings.get('image_processor_type')!r}.")
    return getattr(transformers, kind)(**{k: v for k, v in settings.items() if k != "image_processor_type"})


def _config(name: str, where: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(where, revision=revision)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise _explained(name, error) from error


def _quantization(bits: int, where: str, revision: str | None, dtype: Dtype) -> Any:
    """bitsandbytes' settings; the head stays whole, as an int8 weight cannot be trained."""
    if bits not in (4, 8):
        raise InlayError(f"bits must be 8 or 4, got {bits}.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InlayError(f"a {bits}-bit base needs bitsandbytes: pip install 'inlay[quantize]'.") from None
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        skeleton = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(where, revision=revision))
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one warning a product in eval mode
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=head_modules(skeleton))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=head_modules(skeleton),
    )


def _check_report(name: str, model: PreTrainedModel, report: dict[str, Any], new_head: bool) -> None:
    """transformers re-initialises what does not fit, with no more than a warning: allow that for a new head only."""
    heads = head_modules(model)
    odd = [key for key in report["missing_keys"] if not (new_head and key.split(".")[0] in heads)]
    odd += [key for key, *_ in report["mismatched_keys"] if not (new_head and key.split(".")[0] in heads)]
    if odd:
        hint = " Give the labels of your task for a new head." if all(k.split(".")[0] in heads for k in odd) else ""
        raise InlayError(
            f"the weights of {name} do not fit its config: {len(odd)} tensors are missing or of another shape, "
            f"{odd[0]!r} first.{hint}"
        )


def _draw_head(model: PreTrainedModel) -> None:
    """Draw the new head from N(0, 0.02²), biases zero, whatever the base's own head was.

    transformers initialises a head only where its shape differs from the stored one; a base with as many classes
    would silently keep the old head under the new labels.
    """
    for name in head_modules(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)


def _explained(name: str, error: Exception) -> InlayError:
    """Turn what transformers and huggingface_hub raise into one sentence."""
    text = str(error)
    if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
        return InlayError(
            f"{name} is not in the cache and the Hub cannot be reached; check the network, or use {builtin_names()[0]}."
        )
    if "not a valid model identifier" in text or "404" in text or "is not a local folder" in text:
        return InlayError(f"there is no model {name!r} on the Hub that you may read, and no such folder.")
    if "safetensors" in text and "does not appear to have" in text:
        return InlayError(f"{name} has no model.safetensors; inlay reads no pickled weights: convert it first.")
    if "Unrecognized configuration class" in text:
        return InlayError(f"{name} is no image classifier that transformers knows (AutoModelForImageClassification).")
    return InlayError(
        f"{name} could not be loaded: {text.strip().splitlines()[0] if text.strip() else type(error).__name__}"
    )
