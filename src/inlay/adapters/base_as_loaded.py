"""Is a base, after training, what `load_base` gives again for the adapter? What differs would be in no file."""

import torch
import transformers
from transformers import PreTrainedModel

from inlay.bases.batch_norm import is_batch_norm
from inlay.bases.load import find_head, read_config, resolve_base
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.methods._peft import PeftModel, adapter_parameters, base_modules
from inlay.tasks.base import load_base
from inlay.tasks.task import Task

_STATISTICS = ("running_mean", "running_var")


def check_base_as_loaded(model: PeftModel, task: Task) -> None:
    """Raise InlayError where a saved adapter would miss a part of what this model is.

    A base that cannot be loaded by its name (built by hand, moved since) is taken as it is: its adapters load on a
    model that is given.

    Args:
        model: With the adapter that is to be saved.
        task: For which its base will be loaded.
    """
    base = model.get_base_model()
    _check_class(base, task)
    _check_frozen(model)
    try:
        config = read_config(base.name_or_path, resolve_base(base.name_or_path), None)
    except InlayError:
        return
    _check_vocabulary(base, config)
    _check_head(model, task)
    _check_statistics(model, task)


def _check_class(base: PreTrainedModel, task: Task) -> None:
    """GPT2ForTokenClassification with a text processor would be loaded as GPT2LMHeadModel."""
    loaded = getattr(transformers, task.auto_class)._model_mapping[type(base.config)]
    kinds = loaded if isinstance(loaded, tuple) else (loaded,)
    if not isinstance(base, kinds):
        raise Unsupported(
            f"a {type(base).__name__} is not what inlay loads for {task.name} ({kinds[0].__name__}), so the adapter "
            "could not be loaded; give the processor of what the model is for, or save it with peft's save_pretrained."
        )


def _check_frozen(model: PeftModel) -> None:
    """Parameters of the base that were trained without being part of the adapter."""
    if model.active_peft_config.is_prompt_learning:
        return
    trained = {
        f"{name}.{leaf}": parameter
        for name, module in base_modules(model)
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    }
    if not trained:  # as with most methods: no need to list what the adapter holds
        return
    saved = set(adapter_parameters(model).values())
    held = {id(parameter) for name, parameter in model.named_parameters() if name in saved}
    lost = [name for name, parameter in trained.items() if id(parameter) not in held]
    if lost:
        raise BadInput(
            f"{len(lost)} parameters of the base are trained and no part of the adapter, so they would be lost "
            f"({lost[0]}); freeze them, or train them as a part of it, such as by modules_to_save."
        )


def _check_vocabulary(base: PreTrainedModel, stored: transformers.PreTrainedConfig) -> None:
    """An enlarged embedding is in no adapter that inlay saves, but in those of plain peft, which inlay loads."""
    rows, own = (getattr(config.get_text_config(), "vocab_size", None) for config in (base.config, stored))
    if rows != own:
        raise Unsupported(
            f"the vocabulary of this base has {rows:,} tokens, that of {base.name_or_path} {own:,}, and an adapter "
            "does not hold the new rows. Save it with model.save_pretrained(folder), which stores the embedding "
            "(load_adapter takes that), or enlarge the base before training and save it as a base of its own."
        )


def _check_head(model: PeftModel, task: Task) -> None:
    """A head that transformers drew for a base without one, and that is no part of the adapter."""
    base = model.get_base_model()
    loaded_here = hasattr(base, "new_head")  # `load_base` says whether it drew the head
    heads = find_head(base) if task.classifies and not loaded_here else []
    own = [name for name, _ in base_modules(model) if name in heads]  # without what the adapter holds whole
    if not own:
        return
    try:
        fresh = load_base(base.name_or_path, task=task.name).state_dict()
        same = all(
            key in fresh and value.shape == fresh[key].shape and torch.equal(value.cpu(), fresh[key].to(value.dtype))
            for name in own
            for key, value in base.state_dict().items()
            if key.startswith(f"{name}.")
        )
    except InlayError:  # the weights have no head
        same = False
    if not same:
        raise BadInput(
            f"the head is not that of {base.name_or_path}, and no part of this adapter, so it would be lost; train it: "
            f"modules_to_save={own}."
        )


def _check_statistics(model: PeftModel, task: Task) -> None:
    """Running statistics that moved in train mode: they are the base's, and in no adapter's file."""
    norms = {name: m for name, m in base_modules(model) if is_batch_norm(m)}
    if not norms:
        return
    base = model.get_base_model()
    fresh = dict(load_base(base.name_or_path, task=task.name).named_buffers())
    moved = [
        name
        for name, norm in norms.items()
        for leaf in _STATISTICS
        if (was := fresh.get(f"{name}.{leaf}")) is not None
        and not torch.equal(norm._buffers[leaf].cpu(), was.to(norm._buffers[leaf].dtype))
    ]
    if moved:
        raise BadInput(
            f"the running statistics of {len(set(moved))} BatchNorm layers moved in training ({moved[0]}), and an "
            "adapter does not hold them; train on a base from load_base, or after freeze_statistics(base). What was "
            "trained is kept by model.merge_and_unload().save_pretrained(folder)."
        )
