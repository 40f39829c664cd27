"""Weights of the base itself in an adapter's file: plain peft stores embeddings next to an adapter of theirs, or of a
base whose vocabulary was enlarged (`save_embedding_layers`)."""

import torch
from torch import nn
from transformers import PreTrainedModel

from inlay.adapters.file import AdapterFile
from inlay.errors import WrongBase

START = "base_model.model."
_WRAPPED = ("base_layer", "original_module", "token_adapter")  # what peft's wrappers call the base's own weight

Tensors = dict[str, torch.Tensor]


def split_base_weights(file: AdapterFile, weights: Tensors, base: PreTrainedModel) -> tuple[Tensors, Tensors]:
    """The tensors of the adapter, and those of the base's embeddings by the names they have in it.

    Where the adapter trained an embedding whole, peft stores that one twice: once is taken.
    """
    embeddings = _name_embeddings(base)
    if file.record or not embeddings:
        return weights, {}
    trained = {name for name in embeddings if _trains_whole(file, name)}
    if trained and file.config.get("ensure_weight_tying"):
        trained = set(embeddings)  # the config names one end, and peft trains both as one
    adapter, carried = {}, {}
    for key, value in weights.items():
        parts = key.removeprefix(START).split(".")
        module = ".".join(part for part in parts[:-1] if part not in (*_WRAPPED, "modules_to_save"))
        if module not in embeddings:
            adapter[key] = value
        elif not set(_WRAPPED).isdisjoint(parts) or module not in trained:
            if parts[-1] in embeddings[module]._parameters:
                carried[f"{module}.{parts[-1]}"] = value
            else:
                adapter[key] = value
        else:
            adapter[f"{START}{module}.{parts[-1]}"] = value
    return adapter, carried


def put_base_weights(file: AdapterFile, base: PreTrainedModel, carried: Tensors, shared: bool) -> None:
    """Give a base the embeddings that came with an adapter: one that was loaded for it takes them, with their rows.

    A base that serves for more keeps its own, which must be those.

    Raises:
        InlayError: They are another base's; new rows of which only one end, the input or the output, is in the file.
    """
    if not carried:
        return
    parameters = dict(base.named_parameters(remove_duplicate=False))
    rows = {len(value) for value in carried.values()}
    resized = {len(parameters[name]) for name in carried} != rows
    if not shared and resized and len(rows) == 1:
        tied = base.get_output_embeddings() is None or (
            base.get_output_embeddings().weight is base.get_input_embeddings().weight
        )
        lacking = [name for name in _name_embeddings(base) if not _is_stored(file, name)]
        if lacking and not tied:
            raise WrongBase(
                f"adapter {file.name!r} is of a base whose vocabulary was enlarged to {rows.pop():,} tokens, and its "
                f"file lacks the new rows of {lacking[0]}; give base= with the very model that it was trained on."
            )
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)
        base.requires_grad_(False)
        parameters = dict(base.named_parameters(remove_duplicate=False))
    for name, value in carried.items():
        own = parameters[name]
        if own.shape != value.shape or (shared and not is_base_with(base, {name: value})):
            size, here = (" x ".join(map(str, tensor.shape)) for tensor in (value, own))
            raise WrongBase(
                f"adapter {file.name!r} carries the embedding of its base ({name}, {size}), and this base has another "
                f"({here}); give base= as a name, so that the base is loaded for this adapter and takes it, or the "
                "model that the adapter was trained on."
            )
        if not shared:
            with torch.no_grad():
                own.copy_(value)


def is_base_with(base: PreTrainedModel, carried: Tensors) -> bool:
    """Whether the base has these very weights, rounded to its own type."""
    parameters = dict(base.named_parameters(remove_duplicate=False))
    own = {name: parameters[name] for name in carried}
    return all(
        own[name].shape == value.shape and torch.equal(own[name], value.to(own[name]))
        for name, value in carried.items()
    )


def _name_embeddings(base: PreTrainedModel) -> dict[str, nn.Module]:
    """The embeddings of tokens at the input and the output, by name; none for a model that reads no tokens."""
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:
        return {}
    inside = [end for end in ends if isinstance(end, nn.Embedding | nn.Linear)]
    return {name: module for name, module in base.named_modules() if any(module is end for end in inside)}


def _trains_whole(file: AdapterFile, module: str) -> bool:
    """Whether the adapter has a copy of the module of its own, as peft matches the names in its config."""
    return any(module == name or module.endswith(f".{name}") for name in file.config.get("modules_to_save") or [])


def _is_stored(file: AdapterFile, module: str) -> bool:
    return any(key.startswith(f"{START}{module}.") and ".lora_" not in key for key in file.shapes)
