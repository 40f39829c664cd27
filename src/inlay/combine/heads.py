"""Heads of combined classifiers: modules that were trained whole, and have no sum.

disjoint labels     one head with the rows of all: the logits of each adapter's classes side by side
equal labels        the mean of the rows of each label
others              refused, unless it is said which: stack (labels get the adapter's name), average, or one to keep

Which logits are whose stays known: a combination has each adapter's classes as a group, by the adapter's name, and
`predict(..., group=name)` chooses among these alone, under their own names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from inlay.combine.parts import PREFIX, Array, Source
from inlay.errors import BadInput, Unsupported, WrongBase

WAYS = ("auto", "stack", "average")


@dataclass(frozen=True)
class Heads:
    """What the result has in place of the heads.

    Attributes:
        said: What was done, in a word or two.
        modules: Names for modules_to_save.
        labels: Class names in the order of the logits.
        groups: By group, its class names with their logits; none where all adapters have the same ones.
        shapes: Of the tensors, by key.
        make: A tensor by its key.
    """

    said: str = "none"
    modules: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    make: Callable[[str], Array] = lambda key: np.zeros(0, np.float32)


def join_heads(sources: Sequence[Source], how: str) -> Heads:
    """Plan the head of a combination.

    Args:
        sources: The adapters; those without a head do not count.
        how: auto, stack or average, or the name of the adapter whose head is kept.

    Raises:
        InlayError: There is no adapter of that name; the labels do not say what to do; heads that are no single linear
            layer, or read other features.
    """
    names = [source.name for source in sources]
    if how not in WAYS and how not in names:
        raise BadInput(f"heads must be {', '.join(WAYS)} or the name of an adapter ({', '.join(names)}), got {how!r}.")
    asked = [source for source in sources if source.name == how] or list(sources)
    having = [source for source in asked if source.head]
    if len(having) < 2:
        labels = next((source.file.labels for source in having or asked if source.file.labels), [])
        return _kept(having[0], labels) if having else Heads(labels=labels)
    labels_of = {source.name: _labels(source) for source in having}
    way = _way(labels_of) if how == "auto" else how
    _check_fit(having, labels_of)
    return _joined(having, labels_of, way)


def _kept(source: Source, labels: list[str]) -> Heads:
    tensors = source.tensors
    shapes = {PREFIX + plain: tensors.shape(key) for plain, key in source.head.items()}
    modules = list(source.file.config["modules_to_save"])

    def make(key: str) -> Array:
        return tensors.read(source.head[key.removeprefix(PREFIX)])

    return Heads(f"that of {source.name}", modules, labels, source.file.groups, shapes, make)


def _labels(source: Source) -> list[str]:
    """Names from the record; numbers where plain peft has stored none."""
    if source.file.labels:
        return source.file.labels
    rows = {source.tensors.shape(key)[0] for key in source.head.values()}
    return [f"{source.name}/{i}" for i in range(rows.pop())] if len(rows) == 1 else []


def _way(labels: dict[str, list[str]]) -> str:
    sets = [set(own) for own in labels.values()]
    if sum(map(len, sets)) == len(set().union(*sets)):
        return "stack"
    if all(own == sets[0] for own in sets):
        return "average"
    shared = sorted(set.intersection(*sets)) or sorted(a for a in sets[0] if any(a in other for other in sets[1:]))
    raise BadInput(
        f"the heads have some labels in common ({', '.join(shared[:3])}), but not all; say what they shall become: "
        "heads='stack' (side by side, those labels with their adapter's name), 'average' (one row for each label), or "
        "the name of the adapter whose head is kept."
    )


def _check_fit(sources: Sequence[Source], labels: dict[str, list[str]]) -> None:
    first = sources[0]
    for source in sources:
        shapes = {plain: source.tensors.shape(key) for plain, key in source.head.items()}
        rows = {shape[0] for shape in shapes.values()}
        if rows != {len(labels[source.name])} or sum(plain.endswith("weight") for plain in shapes) != 1:
            raise Unsupported(
                f"the head of adapter {source.name!r} is no single linear layer with a row for each label "
                f"({', '.join(shapes)}); say whose is kept: heads={' or '.join(repr(s.name) for s in sources)}."
            )
        others = {plain: first.tensors.shape(key)[1:] for plain, key in first.head.items()}
        if {plain: shape[1:] for plain, shape in shapes.items()} != others:
            raise WrongBase(
                f"the heads of {first.name!r} and {source.name!r} read other features; keep one: heads=NAME."
            )


def _joined(sources: Sequence[Source], labels_of: dict[str, list[str]], way: str) -> Heads:
    """Rows of all heads, by label; `stack` tells labels that occur twice apart by their adapter."""
    rows: dict[str, list[tuple[Source, int]]] = {}
    every = [label for own in labels_of.values() for label in own]
    for source in sources:
        for i, label in enumerate(labels_of[source.name]):
            twice = way == "stack" and every.count(label) > 1
            rows.setdefault(f"{source.name}/{label}" if twice else label, []).append((source, i))

    def make(key: str) -> Array:
        plain = key.removeprefix(PREFIX)
        read = {source.name: source.tensors.read(source.head[plain]) for source in sources}
        mean = [np.mean([read[s.name][i] for s, i in own], axis=0, dtype=np.float32) for own in rows.values()]
        return np.ascontiguousarray(mean, np.float32)

    shapes = {PREFIX + p: (len(rows), *sources[0].tensors.shape(k)[1:]) for p, k in sources[0].head.items()}
    modules = list(dict.fromkeys(name for source in sources for name in source.file.config["modules_to_save"]))
    said = {"stack": "stacked", "average": "averaged"}[way]
    return Heads(f"{said} {len(rows)} labels", modules, list(rows), _groups(sources, list(rows.values())), shapes, make)


def _groups(sources: Sequence[Source], rows: Sequence[Sequence[tuple[Source, int]]]) -> dict[str, dict[str, int]]:
    """The classes of each adapter with their logits, from what each row is made of; of a combination, of each group."""
    found: dict[str, dict[str, int]] = {}
    for source in sources:
        place = {i: row for row, own in enumerate(rows) for one, i in own if one is source}
        labels, inner = _labels(source), source.file.groups
        if not inner:
            found[source.name] = {labels[i]: row for i, row in sorted(place.items())}
        for name, classes in inner.items():
            taken = any(name in other.file.groups or name == other.name for other in sources if other is not source)
            found[f"{source.name}/{name}" if taken else name] = {label: place[i] for label, i in classes.items()}
    same = all(set(task.values()) == set(next(iter(found.values())).values()) for task in found.values())
    return {} if same else found
