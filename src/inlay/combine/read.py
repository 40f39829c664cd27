"""Adapters opened for combining: checked to be of one base, their tensors sorted by method and site; no torch."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from inlay.adapters.file import AdapterFile, take_all_steps
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.patterns import check_patterns
from inlay.adapters.sketch_distance import explain_difference
from inlay.adapters.weight_file import PREFIX
from inlay.combine.parts import Part, Source, Tensors
from inlay.combine.sums import SUM_BY_PEFT_TYPE
from inlay.combine.weights import Weight, check_parts, check_weight, spread_weights
from inlay.errors import BadInput, DamagedFile, Unsupported, WrongBase

_KINDS = {each.key_prefix: kind for kind, each in SUM_BY_PEFT_TYPE.items() if each.wraps_modules}
_METHOD = re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, _KINDS))})")  # in a key, before the name of the tensor


@contextmanager
def open_adapters(adapters: Mapping[Any, float | Mapping[str, float]]) -> Iterator[list[Source]]:
    """Adapters by folder or Hub id, with their weights, checked to be of one base.

    Digests are taken of what the block reads: `check_digests` compares them, as does the end of the block. A block that
    fails on a damaged file fails with the error of the damage.

    Raises:
        InlayError: Whatever `read_adapter` finds; no adapter; a weight that is no finite number; weights by part that
            do not name the very parts of the adapter; other bases; tensors that belong neither to a method nor to a
            head.
    """
    if not adapters:
        raise BadInput("there are no adapters to combine; give them with their weights, such as {'a': 1.0, 'b': 0.5}.")
    weights = [check_weight(path, weight) for path, weight in adapters.items()]
    readings = [take_all_steps(fetch(path), digest=False) for path in adapters]
    files = [reading.file() for reading in readings]
    sources: list[Source] = []
    with ExitStack() as held:
        opened = [held.enter_context(closing(Tensors(reading.weights, reading.header))) for reading in readings]
        try:
            names = shorten_names([file.folder for file in files])
            _check_bases(dict(zip(names, files, strict=True)))
            for name, weight, file, tensors in zip(names, weights, files, opened, strict=True):
                sources.append(_sort_tensors(name, weight, file, tensors))
                check_parts(name, weight, sources[-1].list_modules())
            spread = spread_weights(weights, [source.list_modules() for source in sources])
            yield [source.with_weight(weight) for source, weight in zip(sources, spread, strict=True)]
        finally:
            for tensors in opened:
                tensors.check_digest()


def check_digests(sources: Iterable[Source]) -> None:
    """Compare all files with the digests in them.

    Raises:
        InlayError: A file is damaged.
    """
    for source in sources:
        source.tensors.check_digest()


def shorten_names(folders: list[Path]) -> list[str]:
    """The last part of each path, and as many before it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise BadInput(
        f"one adapter is named twice among {', '.join(map(str, folders))}; give it once, with its whole weight."
    )


def _check_bases(files: Mapping[str, AdapterFile]) -> None:
    """Sketches where there are some, else names: updates of one base mean nothing to another."""
    (first, one), *others = files.items()
    for name, other in others:
        a, b = one.record.get("base"), other.record.get("base")
        if a and b:
            if not explain_difference(a, b):
                continue
            more = ", which has other weights" if a["name"] == b["name"] else ""
            raise WrongBase(
                f"adapter {first!r} was trained on {a['name']}, {name!r} on {b['name']}{more}; only adapters of one "
                "base can be combined."
            )
        if one.base_name and other.base_name and one.base_name != other.base_name:
            raise WrongBase(
                f"adapter {first!r} was trained on {one.base_name}, {name!r} on {other.base_name}; only adapters of "
                "one base can be combined (for one base under two names put one into base_model_name_or_path of both)."
            )


def _sort_tensors(name: str, weight: Weight, file: AdapterFile, tensors: Tensors) -> Source:
    config = file.config
    inner, whole = config.get("parts") or [], config.get("modules_to_save") or []
    named = isinstance(whole, list) and all(isinstance(module, str) for module in whole)
    if not named or not all(isinstance(part, dict) and isinstance(part.get("peft_type"), str) for part in inner):
        raise DamagedFile(
            f"the config of adapter {name!r} has parts or modules_to_save of a wrong kind; download it again."
        )
    configs = {part["peft_type"]: part for part in inner} or {config["peft_type"]: config}
    sites: dict[str, dict[str, dict[str, str]]] = {kind: {} for kind in configs}
    head: dict[str, str] = {}
    known = configs.keys() <= SUM_BY_PEFT_TYPE.keys()  # others are refused, with the reason, by `make_sums`
    for key in tensors:
        plain = key.removeprefix(PREFIX)
        kind, site, leaf = _parse_key(plain, config["peft_type"])
        if not kind and any(f".{module}." in f".{plain}" for module in whole):
            head[plain] = key
        elif not known or kind in sites:
            sites[kind if known else config["peft_type"]].setdefault(site, {})[leaf] = key
        elif not kind and plain.endswith(".bias") and config.get("bias", "none") != "none":
            raise Unsupported(
                f"adapter {name!r} holds biases of the base itself (bias={config['bias']!r}), which do not add without "
                'it; train with bias="none", or lora_bias=True.'
            )
        else:
            raise Unsupported(
                f"the tensor {key!r} of adapter {name!r} belongs neither to its method nor to modules_to_save; such "
                "adapters cannot be combined."
            )
    check_patterns(config, {site for found in sites.values() for site in found}, name)
    methods = {kind: Part(name, configs[kind], sites[kind], tensors) for kind in configs}
    return Source(name, weight, file, tensors, methods, head)


def _parse_key(key: str, own: str) -> tuple[str, str, str]:
    """Method, site and leaf of a key in an adapter of the peft_type `own`; no method for a tensor of the base."""
    sum_class = SUM_BY_PEFT_TYPE.get(own)
    if sum_class is not None and not sum_class.wraps_modules and key == sum_class.key_prefix:
        return own, "", key
    found = _METHOD.search(key)
    return (_KINDS[found[1]], key[: found.start()], key[found.start(1) :]) if found else ("", "", key)
