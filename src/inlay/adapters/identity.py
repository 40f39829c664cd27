"""Which base a model is, and whether it is the one that an adapter was trained on."""

import json
from dataclasses import dataclass
from typing import Any

import xxhash
from torch import nn

from inlay.adapters.file import AdapterFile
from inlay.adapters.sketch import find_precision, sketch
from inlay.adapters.sketch_distance import explain_difference
from inlay.bases.load import find_size
from inlay.errors import WrongBase


@dataclass(frozen=True)
class Identity:
    """What an adapter must find in its base: structure, weights by their sketch, and the number of convolutions."""

    model_type: str
    blocks: int | None
    width: int | None
    precision: str
    sketch: dict[str, Any]
    convolutions: int = 0

    @property
    def digest(self) -> str:
        """32 hex digits that differ for other weights; rounding on another machine may change them too."""
        seen = json.dumps([self.model_type, self.precision, self.sketch], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(seen.encode())


def identify_base(base: nn.Module) -> Identity:
    """The identity of a base, which one with adapters in it has, too."""
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in base.modules())
    return Identity(base.config.model_type, *find_size(base.config), find_precision(base), sketch(base), convolutions)


def check_base(file: AdapterFile, base: Identity) -> None:
    """Raise InlayError if the adapter's record names another base: structure first, as it gives the clearer sentence.

    Then the weights.
    """
    stored = file.record["base"]
    name = f"adapter {file.name!r} was trained on {stored['name']}"
    for what in ("model_type", "blocks", "width"):
        if stored.get(what) != getattr(base, what):
            raise WrongBase(
                f"{name} ({what.replace('_', ' ')} {stored.get(what)}), but this base has {getattr(base, what)}. "
                "Load it on the base it names."
            )
    for what in ("weights", "parameters"):
        if stored["sketch"][what] != base.sketch[what]:
            kind = "weight matrices" if what == "weights" else "parameters"
            raise WrongBase(
                f"{name} ({stored['sketch'][what]:,} {kind}), but this base has {base.sketch[what]:,}. "
                "Load it on that base."
            )
    if difference := explain_difference(stored, {"precision": base.precision, "sketch": base.sketch}):
        raise WrongBase(
            f"{name}, but this base has other weights of the same shape ({difference}). Load it on the base it names, "
            "or retrain it."
        )
