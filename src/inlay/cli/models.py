"""What the verbs `predict` and `evaluate` take: an adapter or a model, which may be an exported one."""

import sys
from collections.abc import Sequence
from typing import Any

from inlay.errors import BadInput, InlayError
from inlay.tasks.task import Task


def is_adapter(name: str) -> bool:
    """False for a model, which may be an exported one.

    Raises:
        InlayError: It is neither.
    """
    from inlay.adapters.hub.fetch import fetch_if_adapter
    from inlay.compress.exported import is_exported

    return not is_exported(name) and fetch_if_adapter(name) is not None


def find_task(name: str) -> Task:
    """What an adapter or a model is for."""
    from inlay.compress.exported import is_exported, read_exported

    if is_exported(name):
        return read_exported(name).task
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch_if_adapter
    from inlay.adapters.task import find_task_of_file

    if folder := fetch_if_adapter(name):
        return find_task_of_file(read_adapter(folder))
    from inlay.tasks.base import read_task

    return read_task(name)


def hide_bitsandbytes(name: str, base: str | None) -> None:
    """Keep peft from importing bitsandbytes, which takes nearly a second of CPU time, for a base that has no use of it.

    From then on this process finds no bitsandbytes. Nothing is hidden if the base is stored in few bits or cannot be
    read, or if peft is imported already.
    """
    if "peft" in sys.modules or not is_adapter(name):
        return
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.bases.load import read_config, resolve_base

    file = read_adapter(fetch(name))
    where, revision = (base, None) if base else (file.base_name, file.record.get("base", {}).get("revision"))
    try:
        config = read_config(where, resolve_base(where), revision)
    except InlayError:  # loading the adapter says what is wrong
        return
    if getattr(config, "quantization_config", None) is None:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


def load_adapter_in(name: str, base: str | None, device: str | None, dtype: str | None, *, merge: bool = False) -> Any:
    """An adapter on its base, or merged into it; says on standard error in what it computes, if `dtype` asks for it.

    Raises:
        InlayError: What `load_adapter`, `merge` or `set_precision` says.
    """
    from inlay.adapters.load import load_adapter

    # Of a large base there may be room for the type that was asked for only; merging needs float32.
    whole: Any = "float32" if merge or dtype in (None, "auto") else dtype
    loaded = load_adapter(name, base, dtype=whole, device=device)
    return _set_precision(loaded.merge() if merge else loaded, dtype)


def load_ensemble(names: Sequence[str], base: str | None, device: str | None, dtype: str | None) -> list[Any]:
    """Adapters on their bases; those that name the same base share its weights.

    Raises:
        InlayError: What `load_adapter_in` says.
    """
    if len(names) == 1:
        return [load_adapter_in(names[0], base, device, dtype)]
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.adapters.load import load_own_base
    from inlay.bases.device import choose_device
    from inlay.serve.model_bank import ModelBank

    whole: Any = "float32" if dtype in (None, "auto") else dtype
    files = {name: read_adapter(fetch(name), digest=False) for name in names}
    banks: dict[Any, ModelBank] = {}
    loaded = {}
    for name, file in files.items():
        key = base or (file.base_name, file.record.get("base", {}).get("revision"))
        if key not in banks:
            banks[key] = ModelBank(load_own_base(file, base, whole, device=choose_device(device)))
        banks[key].add(name, name)
        loaded[name] = _set_precision(banks[key].load(name), dtype)
    return [loaded[name] for name in names]


def find_digest(name: str) -> str:
    """What tells an adapter's files from those of any other: of its tensors, settings and record."""
    from inlay.adapters.file import hash_config, read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.files.tensor_header import digest_file

    file = read_adapter(fetch(name), digest=False)
    return file.digest or digest_file(file.weights, hash_config(file.config))


def find_channels(name: str) -> tuple[str, ...]:
    """Names of the channels that an adapter's inputs have; none: one without a name."""
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch

    settings = read_adapter(fetch(name), digest=False).record.get("preprocessing") or {}
    return tuple(settings.get("channels", ()))


def load_adapter_or_model(
    name: str, base: str | None, device: str | None, dtype: str | None, *, merge: bool = False
) -> Any:
    """As `load_adapter_in`, or a model.

    Raises:
        InlayError: What `load_adapter_in`, `load_source` or `load_exported` says; an option that a model has no use
            for.
    """
    if is_adapter(name):
        return load_adapter_in(name, base, device, dtype, merge=merge)
    asked = {"--base": base is not None, "--merge": merge}
    if named := [option for option, given in asked.items() if given]:
        raise BadInput(f"{name} is a model: it needs no base and has no adapter to merge; leave {named[0]} out.")
    from inlay.compress.exported import is_exported

    if is_exported(name):
        if device not in (None, "cpu"):
            raise BadInput(f"{name} is an exported model, which computes on the CPU; leave --device out.")
        if dtype is not None:
            raise BadInput(f"{name} is an exported model, which computes as it was exported; leave --dtype out.")
        from inlay.compress.load import load_exported

        return load_exported(name)
    from inlay.bases.device import choose_device
    from inlay.compress.source import load_source

    source = load_source(name)
    source.model.to(choose_device(device))
    return _set_precision(source, dtype)


def _set_precision(loaded: Any, dtype: Any) -> Any:
    from inlay.adapters.precision import lay_out_channels_last, set_precision

    if dtype is None:
        lay_out_channels_last(loaded)
    else:
        print(f"{loaded.name} {set_precision(loaded, dtype)}", file=sys.stderr)
    return loaded
