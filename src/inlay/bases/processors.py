"""Load what turns images and text into a base's input: image processors and tokenizers."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from inlay.bases.load import explain_load_error, is_mask_generator, read_config, resolve_base, take_first_line
from inlay.bases.networks.configs import IMAGENET_PROCESSOR, NETWORK_TYPES
from inlay.bases.stretched_images import STRETCHED, Sam2ImageProcessorPil, asks_for_stretching
from inlay.errors import BadInput, DamagedFile, Unsupported

_PROCESSOR = "preprocessor_config.json"
MAX_SIDE = 8192  # pixels that settings from anywhere may have an image resized to
_SIDES = ("size", "crop_size", "pad_size", "mask_size", "mask_pad_size")


def load_processor(name: str | Path, revision: str | None = None) -> BaseImageProcessor:
    """The image processor of a base, in its Pillow version: the same pixels with and without torchvision.

    A base without preprocessor_config.json gets its model type's standard processor, at the size its config names. Of a
    base that takes grey images or four channels, the processor has `num_channels`, by which tasks open images.

    Raises:
        InlayError: Unknown name, settings that cannot be read or need code of their own, no network, a base that takes
            neither grey nor RGB nor RGBA images.
    """
    name, where = str(name), resolve_base(name, revision)
    config = read_config(name, where, revision)
    try:
        if is_mask_generator(config) and asks_for_stretching(where, revision):
            processor = Sam2ImageProcessorPil.from_pretrained(where, revision=revision, trust_remote_code=False)
        else:
            processor = AutoImageProcessor.from_pretrained(
                where, revision=revision, backend="pil", trust_remote_code=False
            )
    except Exception as error:  # settings are data from anywhere: they fail in any way
        if _has_processor(name, where, revision):
            raise DamagedFile(f"the {_PROCESSOR} of {name} cannot be used: {take_first_line(error)}") from error
        processor = None
    if processor is None:
        processor = _standard_processor(name, config)
    _match_channels(processor, getattr(getattr(config, "vision_config", config), "num_channels", 3), name)
    return processor


def _standard_processor(name: str, config: Any) -> BaseImageProcessor:
    """That of the model type, at the size that the config names."""
    kind = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {}).get("pil")
    if config.model_type in NETWORK_TYPES:
        processor = build_processor(IMAGENET_PROCESSOR)
    elif config.model_type in STRETCHED:
        processor = Sam2ImageProcessorPil()
    elif kind is not None:
        processor = build_processor({"image_processor_type": kind.removesuffix("Pil")})
    else:
        raise BadInput(f"{name} has no {_PROCESSOR}, and {config.model_type} no standard one; add one to the folder.")
    stretched = config.model_type in STRETCHED
    body = config.prompt_encoder_config if stretched else getattr(config, "vision_config", config)
    size: Any = getattr(body, "image_size", None)
    patch: Any = getattr(body, "patch_size", None)
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if hasattr(processor, "max_num_patches"):  # SigLIP 2 NaFlex: images keep their form, up to so many patches
        processor.patch_size, processor.max_num_patches = patch, body.num_patches
    elif isinstance(height, int) and height == width:
        _resize(processor, height, height // patch if isinstance(patch, int) else height)
    elif isinstance(height, int) and hasattr(processor, "crop_pct"):  # ConvNeXt and its kin take images of any form
        _resize(processor, min(height, width), min(height, width))
    elif isinstance(height, int):  # the model takes no other form: nothing is cropped
        processor.size, processor.do_center_crop = {"height": height, "width": width}, False
    return processor


def _match_channels(processor: BaseImageProcessor, channels: Any, name: str) -> None:
    """Let a processor make images of as many channels as the base takes; it makes three by itself."""
    if channels == 3 or not isinstance(channels, int):
        return
    if channels not in (1, 4):
        raise Unsupported(
            f"{name} takes images of {channels} channels; use a base for grey (1), RGB (3) or RGBA (4) images."
        )
    processor.num_channels = channels
    if getattr(processor, "do_convert_rgb", None):
        processor.do_convert_rgb = False
    for key in ("image_mean", "image_std"):
        values = getattr(processor, key, None)
        if isinstance(values, list | tuple) and len(values) == 3:
            average = sum(values) / 3
            setattr(processor, key, [average] if channels == 1 else [*values, average])


def build_processor(settings: dict[str, Any]) -> BaseImageProcessor:
    """Rebuild an image processor, in its Pillow version, from its `to_dict`.

    Raises:
        InlayError: The named class is not one of transformers' image processors, or does not take these settings.
    """
    import transformers

    named = str(settings.get("image_processor_type", ""))
    kind = named.removesuffix("Fast").removesuffix("Pil") + "Pil"
    own = {"Sam2ImageProcessorPil": Sam2ImageProcessorPil}
    if kind not in own and not any(kind == known.get("pil") for known in IMAGE_PROCESSOR_MAPPING_NAMES.values()):
        raise Unsupported(f"unknown image processor {named!r}; transformers has none of that name for Pillow.")
    sides = [n for key in _SIDES if isinstance(settings.get(key), dict) for n in settings[key].values()]
    if large := [n for n in sides if isinstance(n, int | float) and not n <= MAX_SIDE]:
        raise DamagedFile(
            f"the image processor {named} asks for {large[0]} pixels a side; expected at most {MAX_SIDE}."
        )
    build = own.get(kind) or getattr(transformers, kind)
    try:
        return build(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    except (TypeError, ValueError) as error:
        raise DamagedFile(
            f"the image processor {named} does not take these settings: {take_first_line(error)}"
        ) from error


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
        raise explain_load_error(name, error) from error
    return cached is not _CACHED_NO_EXIST


def _resize(processor: BaseImageProcessor, side: int, tokens: int) -> None:
    """Let a standard processor make images of side x side pixels, of which the model makes tokens x tokens."""
    square = {"height": side, "width": side}
    if processor.crop_size and getattr(processor, "do_center_crop", False):
        processor.size, processor.crop_size = {"shortest_edge": round(side * 256 / 224)}, square
    elif getattr(processor.size, "longest_edge", None) and getattr(processor, "mask_size", None):  # SAM
        processor.size, processor.pad_size = {"longest_edge": side}, square
        processor.mask_size = {"longest_edge": 4 * tokens}  # of the logits
        processor.mask_pad_size = {"height": 4 * tokens, "width": 4 * tokens}
    elif "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": side}
    else:
        processor.size = square
        if getattr(processor, "mask_size", None):  # SAM 2
            processor.mask_size = {"height": 4 * tokens, "width": 4 * tokens}


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; its `model_max_length` is no more than the positions that the base has.

    Raises:
        InlayError: Unknown name, a base without a tokenizer or with one that needs code of its own, no network.
    """
    name, where = str(name), resolve_base(name, revision)
    config = read_config(name, where, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizer files are data from anywhere: they fail in any way
        if Path(where).is_dir():
            if not _has_tokenizer(Path(where)):
                raise BadInput(
                    f"{name} is a {config.model_type} without a tokenizer; use a language model, or add its "
                    "tokenizer.json to the folder."
                ) from error
            raise DamagedFile(f"the tokenizer of {name} cannot be used: {take_first_line(error)}") from error
        raise explain_load_error(name, error) from error
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < tokenizer.model_max_length:
        tokenizer.model_max_length = positions
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds any file of a tokenizer, readable or not."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
    return any((folder / name).is_file() for name in (*names, "tokenizer.model", "sentencepiece.bpe.model"))
