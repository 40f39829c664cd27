"""Load a frozen base model, and its image processor, by name: `builtin:`, a local folder or a Hub id."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from inlay._peft import mirror_convolutions
from inlay.arch import head_modules
from inlay.errors import InlayError

Dtype = Literal["float32", "bfloat16", "float16"]
Bits = Literal[4, 8]
BUILTIN = Path(__file__).parent / "builtin"
_PROCESSOR = "preprocessor_config.json"


def builtin_names() -> list[str]:
    """The embedded bases, as `builtin:` names."""
    return sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/config.json"))


def resolve(name: str | Path) -> str:
    """The folder of an embedded or local model; a Hub id is returned as it is.

    Raises:
        InlayError: No embedded model of that name, a folder that holds no model, or neither folder nor Hub id.
    """
    name = str(name)
    if name.startswith("builtin:"):
        if name not in builtin_names():
            raise InlayError(f"there is no embedded model {name!r}; there are {', '.join(builtin_names())}.")
        return str(BUILTIN / name.removeprefix("builtin:"))
    path = Path(name).expanduser()
    if path.is_dir() and name:
        if not (path / "config.json").is_file():
            raise InlayError(f"expected a model folder with config.json, but {name} has none.")
        return str(path)
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise InlayError(f"no model folder at {name!r}; give a folder, a Hub id (user/name) or {builtin_names()[0]}.")
    return name


def load_base(
    name: str | Path,
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
        bits: 8 (LLM.int8) or 4 (NF4) for the linear layers outside the head, through bitsandbytes. Under 4 bits, layers
            whose input is no multiple of 64 stay whole.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The model in eval mode, no parameter requiring a gradient; `model.name_or_path` is `name`, `model.new_head` says
        whether the head was drawn here.

    Raises:
        InlayError: Unknown name, no network, weights that are not safetensors or do not fit their own config, a
            model that is no image classifier, bitsandbytes missing or nothing in the model that it could quantise.
    """
    name, where = str(name), resolve(name)
    config = _config(name, where, revision)
    own = [config.id2label[i] for i in sorted(config.id2label)]
    new_head = labels is not None and list(labels) != own
    if labels is not None and new_head:
        _set_labels(config, labels)
    try:
        with _quiet(local=Path(where).is_dir()):
            model, report = AutoModelForImageClassification.from_pretrained(
                where,
                config=config,
                dtype=getattr(torch, dtype),
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                quantization_config=_quantization(bits, name, config, dtype),
            )
    except InlayError:
        raise
    except Exception as error:  # whatever a strange config or damaged weights make transformers raise
        raise _explained(name, error) from error
    _check_report(name, model, report, new_head)
    if new_head:
        _draw_head(model)
    if bits == 4:
        _compute_plainly(model)
    mirror_convolutions()
    model.name_or_path = model.config._name_or_path = name
    model.new_head = new_head
    return model.requires_grad_(False).eval()


def load_processor(name: str | Path, revision: str | None = None) -> BaseImageProcessor:
    """The image processor of a base, in its Pillow version: the same pixels with and without torchvision.

    A base without preprocessor_config.json gets its model type's standard processor, at the size its config names.

    Raises:
        InlayError: Unknown name, settings that cannot be read or need code of their own, no network.
    """
    name, where = str(name), resolve(name)
    try:
        return AutoImageProcessor.from_pretrained(where, revision=revision, backend="pil", trust_remote_code=False)
    except Exception as error:  # settings are data from anywhere: they fail in any way
        if _has_processor(name, where, revision):
            raise InlayError(f"the {_PROCESSOR} of {name} cannot be used: {_first_line(error)}") from error
    config = _config(name, where, revision)
    kind = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {}).get("pil")
    if kind is None:
        raise InlayError(f"{name} has no {_PROCESSOR}, and {config.model_type} no standard one; add one to the folder.")
    processor = processor_from({"image_processor_type": kind.removesuffix("Pil")})
    side = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(side, int):
        _resize(processor, side)
    return processor


def processor_from(settings: dict[str, Any]) -> BaseImageProcessor:
    """Rebuild an image processor, in its Pillow version, from its `to_dict`.

    Raises:
        InlayError: The named class is not one of transformers' image processors, or does not take these settings.
    """
    import transformers

    named = str(settings.get("image_processor_type", ""))
    kind = named.removesuffix("Fast").removesuffix("Pil") + "Pil"
    if not any(kind == known.get("pil") for known in IMAGE_PROCESSOR_MAPPING_NAMES.values()):
        raise InlayError(f"unknown image processor {named!r}; transformers has none of that name for Pillow.")
    try:
        return getattr(transformers, kind)(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    except (TypeError, ValueError) as error:
        raise InlayError(f"the image processor {named} does not take these settings: {_first_line(error)}") from error


def _has_processor(name: str, where: str, revision: str | None) -> bool:
    """True if the model comes with preprocessing settings, readable or not: those are never replaced by a default."""
    if Path(where).is_dir():
        return (Path(where) / _PROCESSOR).is_file()
    from huggingface_hub import _CACHED_NO_EXIST, file_exists, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(where, _PROCESSOR, revision=revision)
        if cached is None:
            return file_exists(where, _PROCESSOR, revision=revision)
    except Exception as error:  # the Hub's own errors, and those of the network below it
        raise _explained(name, error) from error
    return cached is not _CACHED_NO_EXIST


def _resize(processor: BaseImageProcessor, side: int) -> None:
    """Let a standard processor make pictures of side x side pixels."""
    square = {"height": side, "width": side}
    if processor.crop_size and getattr(processor, "do_center_crop", False):
        processor.size, processor.crop_size = {"shortest_edge": round(side * 256 / 224)}, square
    elif "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": side}
    else:
        processor.size = square


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    names = list(labels)
    if isinstance(labels, str) or len(names) < 2 or len(set(names)) < len(names):
        raise InlayError(f"expected labels as a list of two or more different names, got {str(labels)[:80]!r}.")
    config.num_labels = len(names)  # derived from id2label, but for PVT an attribute of its own
    config.id2label = dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Silence what transformers says while it loads a base, and no longer.

    modeling_utils reports a new head and mismatched weights (`_check_report` refuses the second), tensor_parallel lists
    all layers as "not sharded" on a single device. The bar over weights that are on this disk flashes by.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    bar = local and transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if bar:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _config(name: str, where: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except Exception as error:  # a config is data from anywhere: it fails in any way
        raise _explained(name, error) from error


def _quantization(bits: int | None, name: str, config: Any, dtype: Dtype) -> Any:
    """bitsandbytes' settings; the head stays whole, as an int8 weight cannot be trained.

    So do, under 4 bits, layers whose input is no multiple of NF4's block of 64: bitsandbytes 0.50 dequantises them
    wrongly on a CPU (relative error 0.23 instead of 0.09 for 96 inputs).
    """
    if bits is None:
        return None
    if bits not in (4, 8):
        raise InlayError(f"bits must be 8 or 4, got {bits}.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InlayError(f"a {bits}-bit base needs bitsandbytes: pip install 'inlay[quantize]'.") from None
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        skeleton = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    heads = head_modules(skeleton)
    linear = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] not in heads}
    whole = [n for n, m in linear.items() if bits == 4 and m.in_features % 64]
    if len(whole) == len(linear):
        raise InlayError(f"{name} has no linear layer outside its head that {bits} bits can hold; leave bits out.")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one warning a product in eval mode
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=heads + whole,
    )


def _compute_plainly(model: PreTrainedModel) -> None:
    """Keep NF4 layers from repacking themselves at their first use in eval mode on a CPU with AVX512-BF16.

    bitsandbytes' packed form cannot be dequantised (a sketch of it is wrong), has no gradient (training after an
    evaluation is), and fails for sizes that are no multiple of 32. On other devices the attribute has no effect.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _check_report(name: str, model: PreTrainedModel, report: dict[str, Any], new_head: bool) -> None:
    """transformers re-initialises what does not fit, with no more than a warning: allow that for a new head only."""
    heads = head_modules(model)
    odd = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    odd = sorted(key for key in odd if not (new_head and key.split(".")[0] in heads))
    if odd:
        hint = " Give the labels of your task for a new head." if all(k.split(".")[0] in heads for k in odd) else ""
        raise InlayError(
            f"the weights of {name} do not fit its config: {len(odd)} tensors are missing or of another shape, "
            f"{odd[0]!r} first.{hint}"
        )
    blocks = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for key in sorted(report["unexpected_keys"]):  # other superfluous weights are usual: poolers, text towers
        match = re.match(r"(.+?)\.\d+\.", key)
        if match and match[1] in blocks:
            raise InlayError(f"the weights of {name} do not fit its config: it has no place for {key!r}.")


def _draw_head(model: PreTrainedModel) -> None:
    """Draw the new head from N(0, 0.02²), biases zero, whatever the base's own head was.

    transformers initialises a head only where its shape differs from the stored one; a base with as many classes
    would silently keep the old head under the new labels.
    """
    for name in head_modules(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _explained(name: str, error: Exception) -> InlayError:
    """Turn what transformers, huggingface_hub and safetensors raise into one sentence."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return InlayError(
            f"the weights of {name} are not a whole safetensors file ({_first_line(error)}); get it again."
        )
    if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
        return InlayError(
            f"{name} is not in the cache and the Hub cannot be reached; check the network, or use {builtin_names()[0]}."
        )
    if "not a valid model identifier" in text or "404" in text or "is not a local folder" in text:
        return InlayError(f"there is no model {name!r} on the Hub that you may read, and no such folder.")
    if "safetensors" in text and ("does not appear to have" in text or "no file named" in text):
        return InlayError(f"{name} has no model.safetensors; inlay reads no pickled weights: convert it first.")
    if "trust_remote_code" in text:
        return InlayError(
            f"{name} needs code from its repository, which inlay never runs; use a model of transformers."
        )
    if "Unrecognized configuration class" in text:
        return InlayError(f"{name} is no image classifier that transformers knows (AutoModelForImageClassification).")
    return InlayError(f"{name} could not be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
