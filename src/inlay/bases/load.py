"""Load a frozen base model by name: `builtin:`, a local folder or a Hub id."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForMaskGeneration, PreTrainedModel
from transformers.utils import logging as transformers_logging

from inlay.bases.attention import Attention, explain_attention_error, request_attention
from inlay.bases.batch_norm import freeze_statistics
from inlay.bases.device import Device, choose_device
from inlay.bases.diffusion.config import (
    INDEX,
    is_diffusion,
    is_pipeline_folder,
    is_pipeline_on_hub,
    read_diffusion_config,
)
from inlay.bases.quantize import (
    Quantize,
    compute_plainly,
    find_stored_form,
    flatten_inputs,
    make_quantization_config,
    quantize_layers,
)
from inlay.bases.sites import find_last_norms, head_modules
from inlay.errors import BadInput, DamagedFile, InlayError, Unreachable, Unsupported
from inlay.files.folder_or_hub import refuse_ambiguous

Dtype = Literal["float32", "bfloat16", "float16"]
BUILTIN = Path(__file__).parents[1] / "builtin"
_INDEXES = ("config.json", INDEX)  # a folder with one of these holds a model, or a pipeline of diffusers


def list_builtin_bases() -> list[str]:
    """The embedded bases, as `builtin:` names."""
    found = {path.parent.name for index in _INDEXES for path in BUILTIN.glob(f"*/{index}")}
    return sorted(f"builtin:{name}" for name in found)


def is_model_folder(folder: Path) -> bool:
    """True for a folder with the config of a model, or the index of a pipeline of diffusers."""
    return any((folder / index).is_file() for index in _INDEXES)


def resolve_base(name: str | Path, revision: str | None = None) -> str:
    """The folder of an embedded or local model; a Hub id is returned as it is.

    Raises:
        InlayError: No embedded model of that name, a folder that holds no model, neither folder nor Hub id, or both; a
            revision of what is no Hub id.
    """
    name = str(name)
    if name.startswith("builtin:"):
        if revision is not None:
            raise BadInput(f"revision {revision!r} needs a Hub id, and {name} is none; leave it out.")
        if name not in list_builtin_bases():
            raise BadInput(f"unknown embedded model {name!r}; choose one of {', '.join(list_builtin_bases())}.")
        return str(BUILTIN / name.removeprefix("builtin:"))
    path = Path(name).expanduser()
    if path.is_dir() and name:
        index = next((index for index in _INDEXES if (path / index).is_file()), None)
        if index is None:
            raise BadInput(
                f"{name} has neither config.json nor {INDEX}, so it is no model; give the folder that save_pretrained "
                "wrote."
            )
        refuse_ambiguous(name, index, revision)
        return str(path)
    of_windows = "\\" in name or re.match(r"[A-Za-z]:", name)
    if path.is_file() or of_windows or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise BadInput(
            f"no model folder at {name!r}; give a folder, a Hub id (user/name) or one of "
            f"{', '.join(list_builtin_bases())}."
        )
    return name


def load_pretrained(
    name: str,
    auto_class: str,
    config: Any,
    *,
    labels: Sequence[str] | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    revision: str | None = None,
    device: Device | None = None,
    attention: Attention | None = None,
) -> PreTrainedModel:
    """Load a base by one of transformers' auto classes, with all its weights and running statistics frozen.

    Args:
        name: As `resolve_base` takes it.
        auto_class: Name of transformers' class, such as AutoModelForCausalLM.
        config: From `read_config`; new labels are written into it.
        labels: Class names. If they are not the base's own, the head is new: of this size, drawn from torch's global
            generator (seed it before).
        dtype: Of the weights; under `quantize`, of those that are not quantised.
        quantize: `8bit` (LLM.int8) or `4bit` (NF4) for the linear layers outside the head, through bitsandbytes.
        revision: Branch, tag or commit of a Hub id.
        device: As in `choose_device`; default: where transformers puts it, the CPU, or under `quantize` the GPU.
        attention: Code that computes it; default: what transformers chooses, sdpa where the model has it.

    Returns:
        The model in eval mode, no parameter requiring a gradient; `model.name_or_path` is `name`, `model.new_head` says
        whether the head was drawn here. A pooler that the head reads and the weights lack, such as that of a BERT that
        was trained to fill masks, is drawn with it, and belongs to it from then on (`model.new_poolers`).

    Raises:
        InlayError: No network, weights that are not safetensors or do not fit their own config, bitsandbytes missing or
            nothing in the model that it could quantise; weights that are stored in other bits than `quantize`; an
            attention that the model or this machine lacks.
    """
    where, placed = resolve_base(name), None if device is None else choose_device(device)
    if attention is not None:
        request_attention(config, attention)
    own = [config.id2label[i] for i in sorted(config.id2label)]
    new_head = labels is not None and list(labels) != own
    if labels is not None and new_head:
        set_labels(config, labels)
    loader = getattr(transformers, auto_class)
    stored = find_stored_form(name, config, quantize)
    try:
        packing = None if stored else make_quantization_config(quantize, name, config, loader, dtype)
        by_us = packing is not None and is_diffusion(config)  # diffusers quantises on a GPU only
        with quiet_loading(local=Path(where).is_dir()):
            model, report = loader.from_pretrained(
                where,
                config=config,
                dtype=getattr(torch, dtype),
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                quantization_config=None if by_us else packing,
                # packed on the device itself
                device_map=None if placed is None or not (quantize or stored) else {"": placed},
            )
    except InlayError:
        raise
    except Exception as error:  # whatever a strange config or damaged weights make transformers raise
        raise explain_attention_error(name, attention, error) or explain_load_error(name, error) from error
    # labels of the same names as those of a base that never had a head (LABEL_0, LABEL_1)
    new_head = new_head or (labels is not None and _lacks_heads(model, report["missing_keys"]))
    if new_head:
        model.new_poolers = _missing_poolers(model, report["missing_keys"])
    _check_report(name, model, report, new_head)
    if by_us:
        quantize_layers(model, packing, placed or choose_device(None))
    if new_head:
        _draw_head(model)
    if "4bit" in (quantize, stored):
        compute_plainly(model)
    elif "8bit" in (quantize, stored):
        flatten_inputs()
    model.name_or_path = model.config._name_or_path = name
    model.new_head = new_head
    model.config.architectures = [type(model).__name__]  # the stored one may have another head, or none
    if placed is not None:
        model.to(placed)
    freeze_statistics(model)
    return model.requires_grad_(False).eval()


def load_structure(
    name: str, auto_class: str, config: Any, *, dtype: Dtype = "float32", quantize: Quantize | None = None
) -> PreTrainedModel:
    """A base without its weights, on torch's meta device. Arguments as in `load_pretrained`."""
    loader = getattr(transformers, auto_class)
    find_stored_form(name, config, quantize)
    settings = make_quantization_config(quantize, name, config, loader, dtype)
    try:
        with torch.device("meta"):
            model = loader.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except InlayError:
        raise
    except Exception as error:  # whatever a strange config makes transformers raise
        raise explain_load_error(name, error) from error
    if settings is not None:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    model.name_or_path = name
    freeze_statistics(model)
    return model.requires_grad_(False).eval()


def is_mask_generator(config: Any) -> bool:
    """True for the config of a SAM: it answers points and boxes with masks, and has neither head nor labels."""
    return type(config) in AutoModelForMaskGeneration._model_mapping


def is_headless(config: Any) -> bool:
    """True for the config of a base that has neither head nor labels: a SAM, a text-to-image pipeline."""
    return is_mask_generator(config) or is_diffusion(config)


def find_head(model: Any) -> list[str]:
    """Names of the task head, which new labels replace (`head_modules`); a headless base has none."""
    return [] if is_headless(getattr(model, "config", None)) else head_modules(model)


def find_size(config: Any) -> tuple[int | None, int | None]:
    """Blocks and width of a model, by its config; of SAM those of its image encoder, of SAM 2 its first width."""
    body = config.vision_config if is_mask_generator(config) else config
    body = getattr(body, "backbone_config", body)
    stages = getattr(body, "blocks_per_stage", None)
    blocks = sum(stages) if stages else getattr(body, "num_hidden_layers", None)
    return blocks, getattr(body, "hidden_size", None)


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Write the class names of a new head into a config.

    Raises:
        InlayError: Fewer than two, or one of them twice.
    """
    names = list(labels)
    if isinstance(labels, str) or len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(f"labels must be a list of two or more different names, got {str(labels)[:80]!r}.")
    config.num_labels = len(names)  # derived from id2label, but for PVT an attribute of its own
    config.id2label = dict(enumerate(names))
    config.label2id = {label: i for i, label in enumerate(names)}
    if config.problem_type is not None:  # the base's own head may have named several classes at once, or numbers
        config.problem_type = "single_label_classification"


@contextmanager
def quiet_loading(local: bool) -> Iterator[None]:
    """Silence what transformers and diffusers say while they load a base, and no longer.

    modeling_utils reports a new head and mismatched weights (`_check_report` refuses the second), tensor_parallel lists
    all layers as "not sharded" on a single device. configuration_utils of diffusers is surprised by a setting that its
    own AutoencoderTiny writes. The bar over weights that are on this disk flashes by.
    """
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel", "diffusers.configuration_utils")
    loggers = [logging.getLogger(name) for name in names]
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


def read_config(name: str, where: str, revision: str | None) -> Any:
    """The config of a base, from `resolve_base(name)`."""
    try:
        if is_pipeline_folder(where):
            return read_diffusion_config(name, where, None)
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except InlayError:
        raise
    except Exception as error:  # a config is data from anywhere: it fails in any way
        if is_pipeline_on_hub(where, revision):
            return read_diffusion_config(name, where, revision)
        raise explain_load_error(name, error) from error
    inner = (config, *(getattr(config, part, None) for part in config.sub_configs))
    if kernels := [k for k in (getattr(part, "_attn_implementation", None) for part in inner) if "/" in str(k)]:
        raise Unsupported(f"{name} asks for the attention code {kernels[0]!r} from the Hub, which inlay never runs.")
    return config


def _check_report(name: str, model: PreTrainedModel, report: dict[str, Any], new_head: bool) -> None:
    """transformers re-initialises what does not fit, with no more than a warning: allow that for a new head only."""
    heads = find_head(model)
    odd = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    fresh = tuple(f"{name}." for name in (*heads, *find_last_norms(model)))  # such a norm starts from ones and zeros
    odd = sorted(key for key in odd if not (new_head and key.startswith(fresh)))
    if odd:
        poolers = tuple(f"{pooler}." for pooler in _missing_poolers(model, odd))
        hint = (
            " Give the labels of your task for a new head." if all(k.startswith(fresh + poolers) for k in odd) else ""
        )
        raise DamagedFile(
            f"the weights of {name} do not fit its config: {len(odd)} tensors are missing or of another shape, "
            f"{odd[0]!r} first.{hint}"
        )
    modules = dict(model.named_modules())
    for key in sorted(report["unexpected_keys"]):  # other superfluous weights are usual: poolers, text towers
        match = re.match(r"(.+?)\.\d+\.", key)
        if match and isinstance(modules.get(match[1]), nn.ModuleList) and not _is_old_buffer(key, modules):
            raise DamagedFile(f"the weights of {name} do not fit its config: it has no place for {key!r}.")


# Masks and tables that modules kept among their weights in older versions of transformers, and compute today.
_OLD_BUFFERS = frozenset(
    [
        "attn_mask",
        "causal_mask",
        "embed_positions",
        "inv_freq",
        "masked_bias",
        "position_ids",
        "relative_coords_table",
        "relative_position_index",
    ]
)


def _is_old_buffer(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """True for such a buffer; GPT-2's mask is called `bias`, of an attention whose own layers have the real ones."""
    owner, _, leaf = key.rpartition(".")
    holds_layers = owner in modules and any(True for _ in modules[owner].children())
    return leaf in _OLD_BUFFERS or (leaf == "bias" and holds_layers)


def _missing_poolers(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """The poolers, between backbone and head, of which the weights have nothing at all."""
    absent = set(missing)
    poolers = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    inside = {name: {f"{name}.{key}" for key, _ in module.named_parameters()} for name, module in poolers}
    return [name for name, keys in inside.items() if keys and keys <= absent]


def _lacks_heads(model: PreTrainedModel, missing: Iterable[str]) -> bool:
    """Whether the weights have nothing at all of the task head."""
    heads = tuple(f"{head}." for head in find_head(model))
    inside = {name for name, _ in model.named_parameters() if name.startswith(heads)}
    return bool(inside) and inside <= set(missing)


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


def explain_load_error(name: str, error: Exception) -> InlayError:
    """Turn what transformers, huggingface_hub and safetensors raise into one sentence."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return DamagedFile(
            f"the weights of {name} are not a whole safetensors file ({take_first_line(error)}); download it again."
        )
    if "offline" in text.lower() or "couldn't connect" in text.lower() or "connection" in text.lower():
        return Unreachable(
            f"{name} is not in the cache and the Hub cannot be reached; check the network, or give a folder of it."
        )
    if "not a valid model identifier" in text or "404" in text or "is not a local folder" in text:
        return Unreachable(f"no model {name!r}: it is no folder here, and no model on the Hub that you may read.")
    if "safetensors" in text and ("does not appear to have" in text or "no file named" in text):
        return Unsupported(
            f"{name} has no model.safetensors, and inlay reads neither pickled weights nor exported graphs as a base; "
            "give a model that transformers has saved as safetensors."
        )
    if "trust_remote_code" in text:
        return Unsupported(
            f"{name} needs code from its repository, which inlay never runs; use a model of transformers."
        )
    return DamagedFile(f"{name} could not be loaded: {take_first_line(error)}")


def take_first_line(error: Exception) -> str:
    """Of what an error says, at most 200 characters; of a config that does not fit its class, the reason."""
    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
