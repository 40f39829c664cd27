"""What all sums of adapters share: options, and a class per method that gives settings, shapes and tensors by site."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part
from inlay.combine.rules import Rule, Settings
from inlay.errors import ComputationFailed, Unsupported, WrongBase

Floats = npt.NDArray[np.floating[Any]]
Leaves = dict[str, tuple[int, ...]]
Update = tuple[Array, Array | None]  # B and A of ΔW = B A, or ΔW itself and None

TOLERANCE = 1e-4  # of what is written against the sum of the parts, relative, on random inputs in float32
# Of a config, where parts differ and it is for training only.
_TRAINING = {"lora_dropout", "dropout", "init_weights", "init_lora_weights", "projection"}

_LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # of what target_modules stands for


@dataclass(frozen=True)
class SumOptions:
    """How adapters are combined.

    Attributes:
        rule: A row of RULES.
        settings: Of that rule.
        width: Largest width of the result; auto: as `error` allows; None: whatever the rule gives.
        error: Largest relative error in total, for width="auto".
        keep: Name of the adapter whose heads are kept.
        activations: Hidden states (N, d) that reach a bottleneck, by site.
        zeros: Keep the units of adapters of weight 0, so that shapes do not depend on the weights.
    """

    rule: Rule
    settings: Settings = field(default_factory=Settings)
    width: int | Literal["auto"] | None = None
    error: float = 0.01
    keep: str | None = None
    activations: Mapping[str, Array] = field(default_factory=dict)
    zeros: bool = False


class Sum(ABC):
    """The parts that several adapters have of one method, as one. A subclass is the sum of one peft_type.

    Attributes:
        peft_type: Which one.
        key_prefix: Beginning of the part of a tensor's key that belongs to the method, not to the base.
        title: What one such adapter is called in messages, with its article.
        has_multiples: False where an adapter takes only the weights 1 and 0.
        has_updates: True where an adapter is updates ΔW of weights, on which every rule works.
        wraps_modules: False where the method has one tensor for the whole model, whose key is `key_prefix`.
        config: Settings of the result.
        shapes: Of its tensors, by site and leaf.
        errors: Relative error of each site that `make` has made; 0 where it is exact.
        norms: How large the update of that site is, compared with the others; none where all is exact.
    """

    peft_type: ClassVar[str]
    key_prefix: ClassVar[str]
    title: ClassVar[str]
    has_multiples: ClassVar[bool] = True
    has_updates: ClassVar[bool] = False
    wraps_modules: ClassVar[bool] = True

    def __init__(self, parts: Sequence[Part], options: SumOptions) -> None:
        self.parts, self.options = list(parts), options
        self.errors: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.names = list(dict.fromkeys(site for part in parts for site in part.sites))
        if not options.rule.linear and not self.has_updates:
            raise Unsupported(f"this rule works on updates of weights, which {self.title} does not have; use add.")
        self._acting = {site: self._find_acting_parts(site) for site in self.names}
        wrong = [part for part in parts if not self.has_multiples and part.weight not in (0, 1)]
        if wrong:
            raise Unsupported(
                f"{self.title} adds keys, values or tokens to attend to, which have no multiple: the "
                f"weight of {wrong[0].name!r} must be 1 or 0, not {wrong[0].weight:g}; the exact sum is their union."
            )
        self.config = self.decide_config()
        self.shapes = {site: self.shapes_at(site) for site in self.names}

    @abstractmethod
    def decide_config(self) -> dict[str, Any]:
        """The settings of the result; an error where those of the parts have no common ones."""

    @abstractmethod
    def shapes_at(self, site: str) -> Leaves:
        """Shapes of the tensors at a site."""

    @abstractmethod
    def make(self, site: str) -> dict[str, Array]:
        """The tensors at a site, checked against the parts; the next call may use their memory again."""

    @classmethod
    def update_at(cls, part: Part, site: str) -> Update | None:
        """What an adapter adds to the weight of a module, its own weight included; None where that is no matrix."""
        return None

    @property
    def width(self) -> int:
        """Largest width of the result: rank, units or length; 0 where the method has none."""
        return 0

    def acting_parts(self, site: str) -> list[Part]:
        """The parts that have something at a site: those of weight 0 do not count, unless there are no others."""
        return self._acting[site]

    def _find_acting_parts(self, site: str) -> list[Part]:
        here = [part for part in self.parts if site in part.sites]
        return [part for part in here if part.weight != 0 or self.options.zeros] or here[:1]

    def refuse_width(self, why: str) -> None:
        """Where no width can be chosen."""
        if self.options.width is not None:
            raise Unsupported(f"{self.title} {why}; leave width out.")

    def check(self, site: str, found: Floats, wanted: Floats, scale: float | None = None) -> None:
        """What is written computes what the parts compute together, or nothing is written."""
        size = scale if scale is not None else norm(wanted)
        off = norm(found.astype(np.float64) - wanted)
        if not np.isfinite(off) or off > TOLERANCE * max(size, 1e-30):
            names = ", ".join(dict.fromkeys(part.name for part in self.parts))
            what = "NaN or Inf" if not np.isfinite(off) else f"{off / max(size, 1e-30):.2g} off"
            raise ComputationFailed(
                f"the combination of {names} does not pass its check at {site or 'its tokens'} ({what}); nothing was "
                "written."
            )


def require_equal_shapes(parts: Sequence[Part], site: str, leaf: str) -> tuple[int, ...]:
    """The shape that all these parts have of a leaf.

    Raises:
        InlayError: They differ, as adapters of other bases do.
    """
    shapes = {part.name: part.shape(site, leaf) for part in parts if leaf in part.sites[site]}
    if len(set(shapes.values())) > 1:
        raise WrongBase(f"{site}.{leaf} is {shapes}; only adapters of one base can be combined.")
    return next(iter(shapes.values()))


def find_activation_leaves(parts: Sequence[Part], site: str, start: str, what: str) -> list[str]:
    """Tensors of a non-linearity that has parameters of its own, such as PReLU; one adapter by itself keeps them.

    Args:
        parts: Those that have something at the site.
        site: Which one.
        start: Of the names of these tensors.
        what: The adapters, in the plural, for the message.

    Raises:
        InlayError: Several adapters, of which one has such tensors.
    """
    found = sorted({leaf for part in parts for leaf in part.sites[site] if leaf.startswith(start)})
    if found and len(parts) > 1:
        raise Unsupported(
            f"the activation {parts[0].config['activation']} has a parameter of its own, so that {what} with it do not "
            "add; train them with another one."
        )
    return found


def require_equal_settings(method: str, parts: Sequence[Part], fields: Sequence[str], why: str) -> None:
    """Raise InlayError where settings differ that must be one for a sum."""
    for key in fields:
        values = {part.name: part.config.get(key) for part in parts}
        if len({str(sorted(v) if isinstance(v, list) else v) for v in values.values()}) > 1:
            said = ", ".join(f"{value!r} in {name}" for name, value in values.items())
            raise Unsupported(f"{method} with different settings cannot be added: {key} is {said}; {why}.")


def make_common_config(parts: Sequence[Part], targets: Sequence[str], /, **settings: Any) -> dict[str, Any]:
    """The config of the first part, with the targets of all and with these settings."""
    config = dict(parts[0].config)
    for key in _TRAINING & config.keys():
        if any(part.config.get(key) != config[key] for part in parts):
            config[key] = True if key.startswith("init_") else None if key == "projection" else 0.0
    for key in _LIMITS:
        if key in config:
            config[key] = None
    if "target_modules" in config:
        config["target_modules"] = name_targets(parts, targets)
    return {**config, **settings}


def name_targets(parts: Sequence[Part], names: Sequence[str]) -> list[str] | str:
    """What target_modules has to say for peft to adapt these modules and no others.

    A name in a list stands for every module that is called so or ends so (`conv1` for `layer1.0.conv1` too). Where the
    parts were lists, each of them had all of those; where one chose by a pattern, by layers or with exclusions, names
    that could be an ending are given as a pattern of whole names.
    """
    listed = all(isinstance(part.config.get("target_modules"), list) for part in parts)
    limited = any(part.config.get(key) for part in parts for key in _LIMITS)
    tied = any(part.config.get("ensure_weight_tying") for part in parts)  # peft looks for an embedding's name in a list
    if (listed and not limited) or tied or not any("." not in name or is_ending(name, names) for name in names):
        return sorted(names)
    return match_whole_names(names)


def is_ending(name: str, names: Sequence[str]) -> bool:
    """True if another one of these modules ends with the name."""
    return any(other.endswith(f".{name}") for other in names)


def match_whole_names(names: Sequence[str]) -> str:
    """A regular expression that matches these names in full, and nothing else."""
    return "|".join(re.escape(name) for name in sorted(names))
