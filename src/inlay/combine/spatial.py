"""Sums of 3D spatial adapters: bottlenecks side by side, as flat ones are; changes of SAM's weights; one decoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.method_sum import Leaves, Sum, make_common_config, require_equal_settings
from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part
from inlay.errors import DamagedFile, Unsupported, WrongBase

_DECODER = "inlay_spatial3d_decoder."


class SpatialSum(Sum):
    """Several 3D spatial adapters as one: bottlenecks side by side, changes of SAM's weights added, one decoder kept.

    A decoder with the necks in front of it is a head: a network of its own, which has no sum.
    """

    peft_type = "INLAY_SPATIAL3D"
    key_prefix = "inlay_spatial3d_"
    title = "a 3D spatial adapter"

    @override
    def decide_config(self) -> dict[str, Any]:
        free = {"width", "reduction", "classes", "levels", "decoder_width", "prompts", "rounds", "reference"}
        free |= {"init_weights", "target_modules", "exclude_modules", "modules_to_save", "base_model_name_or_path"}
        free |= {"peft_version", "auto_mapping", "inference_mode", "revision", "task_type", "peft_type"}
        _require_equal_channels(self.parts)
        require_equal_settings(
            "3D spatial adapters", self.parts, [k for k in self.parts[0].config if k not in free], "train them alike"
        )
        if any(part.config.get("reference") for part in self.parts) and len(self.parts) > 1:
            raise Unsupported(
                "3D spatial adapters of the published kind have an activation after W_up, so that they do not add; "
                "train them with reference=False."
            )
        keep = [part for part in self.parts if part.name == self.options.keep] or self.parts
        if len(keep) > 1:
            raise Unsupported(
                "each of these adapters has a decoder of its own, a network that has no sum; say whose is kept: heads="
                + " or ".join(repr(part.name) for part in self.parts)
                + "."
            )
        self.kept = keep[0]
        widths = [self._count_units(part) for part in self.parts if part.weight != 0 or self.options.zeros]
        self.full = sum(widths) or self._count_units(self.parts[0])
        self.units = self.full
        if self.options.width == "auto":
            self.units = min(self.full, self._find_narrowest_width())
        elif self.options.width is not None:
            self.units = min(self.full, self.options.width)
        own = {
            k: self.kept.config[k] for k in ("classes", "levels", "decoder_width", "prompts") if k in self.kept.config
        }
        return make_common_config(self.parts, self.parts[0].config.get("target_modules") or [], width=self.units, **own)

    @property
    @override
    def width(self) -> int:
        return self.units

    def _count_units(self, part: Part) -> int:
        for site in part.sites:
            for leaf in part.sites[site]:
                if leaf.endswith(".adapter.down.weight"):
                    return part.shape(site, leaf)[0]
        raise DamagedFile(f"adapter {part.name!r} holds no spatial bottleneck; download it again.")

    @override
    def shapes_at(self, site: str) -> Leaves:
        """Of the bottlenecks the width is another; all else is as it was."""
        shapes: Leaves = {}
        for leaf in self.kept.sites[site]:
            shape = self.kept.shape(site, leaf)
            if ".adapter." in leaf and not leaf.endswith("up.bias"):
                axis = 1 if leaf.endswith("up.weight") else 0
                shape = (*shape[:axis], self.units, *shape[axis + 1 :])
            elif not _is_head(leaf):
                for part in self.parts:
                    if leaf in part.sites[site] and part.shape(site, leaf) != shape:
                        raise WrongBase(f"{leaf} is {part.shape(site, leaf)} in {part.name!r}, {shape} in others.")
            shapes[leaf] = shape
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for leaf in self.shapes[site]:
            if _is_head(leaf):
                made[leaf] = self.kept.read(site, leaf)
            elif ".adapter." not in leaf:
                made[leaf] = self._add_deltas(site, leaf)
            elif leaf.endswith("down.weight"):
                made |= self._make_block(site, leaf.removesuffix("down.weight"))
                self.norms[site] = 1.0
        self.errors.setdefault(site, 0.0)
        return made

    def _add_deltas(self, site: str, leaf: str) -> Array:
        total = np.zeros(self.shapes[site][leaf], np.float32)
        for part in self.acting_parts(site):
            total += np.float32(part.weight) * part.read(site, leaf)
        return total

    def _make_block(self, site: str, start: str) -> dict[str, Array]:
        """The bottleneck of one block; where it has to be smaller, the units with the largest product of norms stay."""
        made = self._join_units(site, start)
        if self.units < self.full:
            weight = _measure_importance(made, start)
            order = np.argsort(-weight, kind="stable")
            kept = np.sort(order[: self.units])
            for leaf in made:
                if not leaf.endswith("up.bias"):
                    made[leaf] = np.take(made[leaf], kept, axis=1 if leaf.endswith("up.weight") else 0)
            lost = norm(weight[order[self.units :]]) / max(norm(weight), 1e-30)
            self.errors[site] = max(self.errors.get(site, 0.0), lost)
        return made

    def _join_units(self, site: str, start: str) -> dict[str, Array]:
        """The units of all adapters in one block."""
        here = self.acting_parts(site)
        made: dict[str, Array] = {}
        for leaf in (leaf for leaf in self.kept.sites[site] if leaf.startswith(start)):
            read = [part.read(site, leaf) for part in here]
            if leaf.endswith(("up.weight", "up.bias")):
                read = [np.float32(part.weight) * x for part, x in zip(here, read, strict=True)]
            if leaf.endswith("up.bias"):
                made[leaf] = np.asarray(np.sum(read, axis=0), np.float32)
            else:
                made[leaf] = np.concatenate(read, axis=1 if leaf.endswith("up.weight") else 0)
        return made

    def _find_narrowest_width(self) -> int:
        """The smallest width that leaves out no more than the error of what the units of any block weigh."""
        width = 1
        for site in self.names:
            for leaf in (leaf for leaf in self.kept.sites[site] if leaf.endswith(".adapter.down.weight")):
                start = leaf.removesuffix("down.weight")
                weight = np.sort(_measure_importance(self._join_units(site, start), start))[::-1]
                left = [norm(weight[i:]) for i in range(len(weight) + 1)]
                width = max(width, next(i for i, lost in enumerate(left) if lost <= self.options.error * left[0]))
        return width


def _measure_importance(block: dict[str, Array], start: str) -> Array:
    """Of each unit of a block: the product of the norms of its way in, its kernel and its way out."""
    up, down = block[f"{start}up.weight"], block[f"{start}down.weight"]
    weight: Array = np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1)
    if f"{start}conv.weight" in block:
        weight = weight * np.linalg.norm(block[f"{start}conv.weight"].reshape(len(weight), -1), axis=1)
    return weight


def _require_equal_channels(parts: Sequence[Part]) -> None:
    """Raise InlayError where adapters were trained on other channels, or in another order."""
    named = {part.name: part.config.get("channels") for part in parts}
    if len({tuple(channels or ()) for channels in named.values()}) > 1:
        said = ", ".join(f"{', '.join(channels or ['one'])} in {name!r}" for name, channels in named.items())
        raise Unsupported(
            f"3D spatial adapters for different channels of a scan cannot be added: {said}; train them on the same "
            "channels, in the same order."
        )


def _is_head(leaf: str) -> bool:
    return leaf.startswith(_DECODER) or ".necks." in leaf
