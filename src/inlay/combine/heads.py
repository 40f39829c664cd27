"""Heads of combined classifiers, and other modules that were trained whole: those have no sum of updates.

disjoint labels     one head with the rows of all: the logits of each adapter's classes side by side
equal labels        the mean of the rows of each label, by the adapters' weights
others              refused, unless it is said which: stack (labels get the adapter's name), average, or one to keep

Which logits are whose stays known: a combination has each adapter's classes as a group, by the adapter's name, and
`predict(..., group=name)` chooses among these only, under their own names.

A whole copy W_i of another module (a language model's output projection, an embedding, a norm) stands for the base's
W plus a change. Without the base the sum W + Σ w_i (W_i - W) is known where the weights add up to 1: it is Σ w_i W_i.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from inlay.adapters.weight_file import PREFIX
from inlay.combine.parts import Array, Source, Tensors
from inlay.combine.weights import Weight, weight_at
from inlay.errors import BadInput, Unsupported, WrongBase

WAYS = ("auto", "stack", "average")
# Modules with a row for each token, which plain peft saves without labels as it does a head of classes.
_VOCABULARY = {"lm_head", "embed_out", "embed_tokens", "word_embeddings", "wte", "wpe", "embed_in", "shared"}
_CLASSIFIES = {None, "SEQ_CLS", "TOKEN_CLS"}  # task_type of peft


@dataclass(frozen=True)
class Rows:
    """Rows that one adapter gives to a tensor of the result.

    Attributes:
        adapter: Its name.
        tensors: Its file.
        key: The tensor in it.
        rows: Which rows of it.
        places: Which rows of the result.
    """

    adapter: str
    tensors: Tensors
    key: str
    rows: npt.NDArray[np.intp]
    places: npt.NDArray[np.intp]

    def read(self) -> Array:
        """The rows."""
        return np.atleast_1d(self.tensors.read(self.key))[self.rows]


def _count_rows(shape: tuple[int, ...]) -> int:
    """A single number counts as one row."""
    return shape[0] if shape else 1


@dataclass(frozen=True)
class Heads:
    """What the result has in place of the heads.

    Attributes:
        summary: What was done, in a word or two.
        modules: Names for modules_to_save.
        labels: Class names in the order of the logits.
        groups: By group, its class names with their logits; none where all adapters have the same ones.
        shapes: Of the tensors, by key.
        rows: What each tensor is made of, by key.
        weights: Of the adapters, by name: a row that several have is their mean by these.
    """

    summary: str = "none"
    modules: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: dict[str, list[Rows]] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def make(self, key: str) -> Array:
        """One tensor.

        Raises:
            InlayError: Weights that make no mean.
        """
        parts = self.rows[key]
        if len(parts) == 1 and len(parts[0].rows) == _count_rows(self.shapes[key]):
            return parts[0].tensors.read(parts[0].key)
        made = np.zeros(self.shapes[key] or (1,), np.float32)
        for part, share in zip(parts, self.divide_weights(key), strict=True):
            made[part.places] += share.reshape(-1, *[1] * (made.ndim - 1)).astype(np.float32) * part.read()
        return made.reshape(self.shapes[key])

    def divide_weights(self, key: str) -> list[npt.NDArray[np.float64]]:
        """What each of an adapter's rows of a tensor counts: w / Σ w of those that have the row; alone it counts 1.

        Where all weights of a row are 0, they count alike.
        """
        parts, plain = self.rows[key], key.removeprefix(PREFIX)
        weights = {part.adapter: weight_at(self.weights[part.adapter], plain) for part in parts}
        total, any_weight, count = np.zeros((3, _count_rows(self.shapes[key])))  # of each row
        for part in parts:
            total[part.places] += weights[part.adapter]
            any_weight[part.places] += abs(weights[part.adapter])
            count[part.places] += 1
        shared = (count > 1) & (any_weight > 0)
        if np.any(total[shared] <= 1e-9 * any_weight[shared]):
            said = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
            raise BadInput(
                f"heads cannot be averaged by weights that add up to 0 or less ({said}); name the adapter whose "
                f"head is kept: heads={' or '.join(map(repr, self.weights))}."
            )
        alike = 1 / np.maximum(count, 1)
        total = np.where(shared, total, 1)
        return [np.where(shared, weights[part.adapter] / total, alike)[part.places] for part in parts]

    def with_weights(self, weights: Mapping[str, Weight]) -> "Heads":
        """The same with other weights."""
        return replace(self, weights={name: weights[name] for name in self.weights})


def join_heads(sources: Sequence[Source], how: str, exact: bool = True) -> Heads:
    """Decide the head of a combination.

    Args:
        sources: The adapters, with their weights; those without a head do not count.
        how: auto, stack or average, or the name of the adapter whose head is kept.
        exact: Whole copies of modules that are no head of classes may be summed, where their weights add up to 1.

    Raises:
        InlayError: There is no adapter of that name; the labels do not say what to do; heads that are no single linear
            layer, or read other features; weights that make no mean; copies whose sum takes the base.
    """
    names = [source.name for source in sources]
    if how not in WAYS and how not in names:
        raise BadInput(f"unknown heads {how!r}; choose one of {', '.join(WAYS)}, or an adapter: {', '.join(names)}.")
    asked = [source for source in sources if source.name == how] or list(sources)
    having = [source for source in asked if source.head]
    labels = next((source.file.labels for source in having or asked if source.file.labels), [])
    if not having:
        return Heads(labels=labels)
    if how in names:
        return _keep_head(having[0], labels)
    strange = [source for source in having if not _is_classifier(source)]
    if strange and (len(having) > 1 or len(strange) == len(having)):
        return _sum_copies(having, labels, how, exact, strange[0])
    if len(having) == 1:
        return _keep_head(having[0], labels)
    labels_of = {source.name: _name_rows(source, how) for source in having}
    unnamed = [source.name for source in having if not source.file.labels]
    if how == "average" and 0 < len(unnamed) < len(having):
        raise BadInput(
            f"adapter {unnamed[0]!r} names no labels, by which the rows of heads are averaged; use heads='stack', or "
            "the name of the adapter whose head is kept."
        )
    way = _choose_way(labels_of) if how == "auto" else how
    return _join_rows(having, labels_of, way, _find_class_layer(having, labels_of, way))


def _is_classifier(source: Source) -> bool:
    """True for heads of classes: by the labels of the record, or as plain peft saves them, by name and task_type."""
    rows = {source.tensors.shape(key)[:1] for key in source.head.values()}
    if source.file.record:
        return bool(source.file.labels) and (len(source.file.labels),) in rows
    at_top = [name for name in source.file.config["modules_to_save"] if name not in _VOCABULARY]
    plain = all(name.startswith(tuple(f"{module}." for module in at_top)) for name in source.head)
    matrices = any(len(source.tensors.shape(key)) > 1 for key in source.head.values())
    return plain and matrices and source.file.config.get("task_type") in _CLASSIFIES


def _keep_head(source: Source, labels: list[str]) -> Heads:
    rows = {PREFIX + plain: [_take_all_rows(source, key)] for plain, key in source.head.items()}
    shapes = {PREFIX + plain: source.tensors.shape(key) for plain, key in source.head.items()}
    modules = list(source.file.config["modules_to_save"])
    weights = {source.name: source.weight}
    return Heads(f"that of {source.name}", modules, labels, source.file.groups, shapes, rows, weights)


def _take_all_rows(source: Source, key: str) -> Rows:
    every = np.arange(_count_rows(source.tensors.shape(key)))
    return Rows(source.name, source.tensors, key, every, every)


def _sum_copies(sources: Sequence[Source], labels: list[str], how: str, exact: bool, strange: Source) -> Heads:
    """Whole copies of modules that are no head of classes: their mean by the weights."""
    modules = list(dict.fromkeys(name for source in sources for name in source.file.config["modules_to_save"]))
    names = [source.name for source in sources]
    keep = f"name the adapter whose copy is kept: heads={' or '.join(map(repr, names))}"
    if how == "stack":
        raise Unsupported(
            f"adapter {strange.name!r} holds a whole copy of {', '.join(strange.file.config['modules_to_save'])}, "
            f"which is no head of classes and cannot be stacked; use heads='average', or {keep}."
        )
    rows: dict[str, list[Rows]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for plain in dict.fromkeys(plain for source in sources for plain in source.head):
        having = [source for source in sources if plain in source.head]
        sizes = {source.tensors.shape(source.head[plain]) for source in having}
        if len(sizes) > 1:
            raise WrongBase(f"{plain} has the shapes {sorted(sizes)}, which cannot be averaged; {keep}.")
        total = sum(weight_at(source.weight, plain) for source in having)
        if how == "auto" and not (exact and math.isclose(total, 1, rel_tol=1e-6)):
            raise Unsupported(
                f"{plain} is a whole copy in {' and '.join(repr(source.name) for source in having)}, not an update: "
                f"without the base a sum of copies is known for linear rules and weights that add up to 1, not "
                f"{total:g}; use rule='average', heads='average' for the mean by the weights, or {keep}."
            )
        shapes[PREFIX + plain] = sizes.pop()
        rows[PREFIX + plain] = [_take_all_rows(source, source.head[plain]) for source in having]
    weights = {source.name: source.weight for source in sources}
    said = f"averaged copies of {', '.join(modules)}" if len(sources) > 1 else f"that of {names[0]}"
    return _check_means(Heads(said, modules, labels, {}, shapes, rows, weights))


def _check_means(heads: Heads) -> Heads:
    """Raise InlayError where the weights make no mean."""
    for key in heads.shapes:
        heads.divide_weights(key)
    return heads


def _name_rows(source: Source, how: str) -> list[str]:
    """Names from the record; numbers where plain peft has stored none, which are one adapter's own if heads stack."""
    if source.file.labels:
        return source.file.labels
    rows = {source.tensors.shape(key)[:1] for key in source.head.values()}
    if len(rows) > 1 or () in rows:
        return []
    (count,) = rows.pop()
    return [str(i) if how == "average" else f"{source.name}/{i}" for i in range(count)]


def _choose_way(labels: dict[str, list[str]]) -> str:
    sets = [set(own) for own in labels.values()]
    if sum(map(len, sets)) == len(set().union(*sets)):
        return "stack"
    if all(own == sets[0] for own in sets):
        return "average"
    shared = sorted(set.intersection(*sets)) or sorted(a for a in sets[0] if any(a in other for other in sets[1:]))
    raise BadInput(
        f"the heads have some labels in common ({', '.join(shared[:3])}), but not all; say what becomes of them: "
        "heads='stack' (side by side, those labels with their adapter's name), 'average' (one row for each label), or "
        "the name of the adapter whose head is kept."
    )


def _find_class_layer(sources: Sequence[Source], labels: dict[str, list[str]], way: str) -> set[str]:
    """The tensors that have a row for each label; others belong to layers before, which read the same features."""
    found = []
    for source in sources:
        shapes = {plain: source.tensors.shape(key) for plain, key in source.head.items()}
        own = {plain for plain, shape in shapes.items() if shape[:1] == (len(labels[source.name]),)}
        inner = sorted(shapes.keys() - own)
        keep = f"say whose is kept: heads={' or '.join(repr(s.name) for s in sources)}"
        if sum(len(shapes[plain]) > 1 for plain in own) != 1:
            raise Unsupported(
                f"the head of adapter {source.name!r} has no one linear layer with a row for each label "
                f"({', '.join(shapes)}); {keep}."
            )
        if inner and way == "stack":
            raise Unsupported(
                f"the rows for labels in the head of adapter {source.name!r} read layers of their own "
                f"({', '.join(inner)}), so that heads cannot be stacked; {keep}."
            )
        found.append({plain: shape[1:] if plain in own else shape for plain, shape in shapes.items()})
        if found[0] != found[-1]:
            raise WrongBase(
                f"the heads of {sources[0].name!r} and {source.name!r} read other features; keep one: heads=NAME."
            )
    return own


def _join_rows(sources: Sequence[Source], labels_of: dict[str, list[str]], way: str, class_layer: set[str]) -> Heads:
    """Rows of all heads, by label; `stack` tells labels that occur twice apart by their adapter."""
    made_of: dict[str, list[tuple[Source, int]]] = {}
    counts = Counter(label for own in labels_of.values() for label in own)
    for source in sources:
        for i, label in enumerate(labels_of[source.name]):
            twice = way == "stack" and counts[label] > 1
            made_of.setdefault(f"{source.name}/{label}" if twice else label, []).append((source, i))
    labels = list(made_of)
    shapes, rows = {}, {}
    for plain, first in sources[0].head.items():
        shape = sources[0].tensors.shape(first)
        if plain in class_layer:
            shapes[PREFIX + plain] = (len(labels), *shape[1:])
            rows[PREFIX + plain] = [
                _take_rows(source, source.head[plain], list(made_of.values())) for source in sources
            ]
        else:
            shapes[PREFIX + plain] = shape
            rows[PREFIX + plain] = [_take_all_rows(source, source.head[plain]) for source in sources]
    modules = list(dict.fromkeys(name for source in sources for name in source.file.config["modules_to_save"]))
    said = {"stack": "stacked", "average": "averaged"}[way]
    groups = _group_labels(sources, labels_of, list(made_of.values()))
    weights = {source.name: source.weight for source in sources}
    return _check_means(Heads(f"{said} {len(labels)} labels", modules, labels, groups, shapes, rows, weights))


def _take_rows(source: Source, key: str, made_of: Sequence[Sequence[tuple[Source, int]]]) -> Rows:
    """Where the rows of one adapter stand among those of the result."""
    pairs = [(i, place) for place, own in enumerate(made_of) for one, i in own if one is source]
    rows, places = np.array(pairs, np.intp).T
    return Rows(source.name, source.tensors, key, rows, places)


def _group_labels(
    sources: Sequence[Source], labels_of: dict[str, list[str]], rows: Sequence[Sequence[tuple[Source, int]]]
) -> dict[str, dict[str, int]]:
    """The classes of each adapter with their logits, from what each row is made of; of a combination, of each group."""
    found: dict[str, dict[str, int]] = {}
    for source in sources:
        place = {i: row for row, own in enumerate(rows) for one, i in own if one is source}
        labels, inner = labels_of[source.name], source.file.groups
        if not inner:
            found[source.name] = {labels[i]: row for i, row in sorted(place.items())}
        for name, classes in inner.items():
            taken = any(name in other.file.groups or name == other.name for other in sources if other is not source)
            found[f"{source.name}/{name}" if taken else name] = {label: place[i] for label, i in classes.items()}
    same = all(set(task.values()) == set(next(iter(found.values())).values()) for task in found.values())
    return {} if same else found
