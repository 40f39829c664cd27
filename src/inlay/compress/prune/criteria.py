"""CRITERIA: how much each unit of a model matters. One short function and one row each; more is better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.bases.widths import Group, weight_axis
from inlay.compress.prune.statistics import Evidence, Need, feature_places, weight_matrix
from inlay.errors import BadInput, Unsupported


@dataclass(frozen=True)
class Material:
    """What a criterion may look at.

    Attributes:
        model: The model.
        group: Whose units are judged.
        evidence: Of the examples; what the criterion needs of it is there.
        generator: For what is drawn.
    """

    model: nn.Module
    group: Group
    evidence: Evidence
    generator: torch.Generator

    def filters(self) -> Tensor:
        """The weights that compute each unit, (U, n)."""
        rows = []
        for part in self.group.made:
            module = self.model.get_submodule(part.module)
            if module.weight.ndim > 1:  # a BatchNorm has no filters
                weight = module.weight.detach().cpu().movedim(weight_axis(module, "out"), 0).flatten(1)
                rows.append(weight[part.places].flatten(1))
        return torch.cat(rows, 1).double()


@dataclass(frozen=True)
class Criterion:
    """One row of CRITERIA.

    Attributes:
        score: Of each unit, (U,).
        paper: Its source.
        needs: What has to be known of examples.
        comparable: Values of different layers mean the same, a change of the loss, and are weighed against what a unit
            costs. Others are divided by the mean of their layer before layers are compared.
    """

    score: Callable[[Material], Tensor]
    paper: str
    needs: frozenset[Need] = frozenset()
    comparable: bool = False


def draw_at_random(material: Material) -> Tensor:
    """Equally distributed from 0 to 1: what every other criterion has to beat."""
    return torch.rand(material.group.units, generator=material.generator, dtype=torch.float64)


def sum_magnitudes(material: Material) -> Tensor:
    """Σ |w| over the weights that compute the unit."""
    return material.filters().abs().sum(1)


def measure_norm(material: Material) -> Tensor:
    """√(Σ w²) over the weights that compute the unit."""
    return material.filters().norm(dim=1)


def read_batchnorm_scale(material: Material) -> Tensor:
    """|γ| of the last BatchNorm before the reader."""
    for part in reversed(material.group.made):
        module = material.model.get_submodule(part.module)
        if isinstance(module, nn.BatchNorm2d):
            return module.weight.detach().cpu().double().abs()[part.places].sum(1)
    raise Unsupported(
        f"the units of {material.group.name} have no BatchNorm, whose scale could be read; choose another criterion."
    )


def count_positive(material: Material) -> Tensor:
    """1 - APoZ: the share of the unit's values over zero."""
    return material.evidence.positive[material.group.name]


def weigh_activation(material: Material) -> Tensor:
    """Σ |w|·‖x‖₂ over the weights that read the unit."""
    total = torch.zeros(material.group.units, dtype=torch.float64)
    for part in material.group.read:
        reader = material.model.get_submodule(part.module)
        norms = material.evidence.seen[part.module].gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # G F
        features = (weight_matrix(reader).double().abs().sum(1) * norms).sum(0)
        total += features[feature_places(reader, part.places)].sum(1)
    return total


def estimate_loss_change(material: Material) -> Tensor:
    """The square of the first-order change of the loss without the unit, a mean over examples: (Σ a·∂L/∂a)²."""
    return material.evidence.taylor[material.group.name]


def choose_by_reconstruction(material: Material) -> Tensor:
    """The error of the readers' outputs when the units are left out one by one, the cheapest next each time.

    The score of a unit is the squared error once it is left out with all that went before it.
    """
    error = 0.0
    pairs = torch.zeros(material.group.units, material.group.units, dtype=torch.float64)
    for part in material.group.read:
        reader, seen = material.model.get_submodule(part.module), material.evidence.seen[part.module]
        weight = weight_matrix(reader).double()
        products = (seen.gram * (weight.mT @ weight)).sum(0)  # F F: what two inputs add to ‖y‖² together
        places = feature_places(reader, part.places)  # U n
        # Σ over the places of both units
        pairs += products[places.flatten()][:, places.flatten()].view(*places.shape, *places.shape).sum((1, 3))
    scores, left = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool)
    added = pairs.diagonal().clone()  # what leaving out each unit would add to the error
    for _ in range(len(pairs)):
        unit = int(torch.where(left, added, torch.inf).argmin())
        error = max(error, error + float(added[unit]))
        scores[unit] = error
        left[unit] = False
        added += 2 * pairs[unit]
    return scores


CRITERIA: dict[str, Criterion] = {
    "random": Criterion(draw_at_random, "the baseline of every comparison: Mittal et al. 2018, arXiv:1801.10447"),
    "l1": Criterion(sum_magnitudes, "Li et al. 2017, arXiv:1608.08710"),
    "l2": Criterion(measure_norm, "Li et al. 2017, arXiv:1608.08710, section 3, with the l2 norm"),
    "batchnorm": Criterion(read_batchnorm_scale, "Liu et al. 2017 (network slimming), arXiv:1708.06519"),
    "apoz": Criterion(count_positive, "Hu et al. 2016 (APoZ), arXiv:1607.03250", frozenset({"activations"})),
    "activation": Criterion(
        weigh_activation, "Sun et al. 2024 (Wanda), arXiv:2306.11695, summed over a unit", frozenset({"activations"})
    ),
    "taylor": Criterion(
        estimate_loss_change, "Molchanov et al. 2019, arXiv:1906.10771", frozenset({"gradients"}), comparable=True
    ),
    "thinet": Criterion(
        choose_by_reconstruction, "Luo et al. 2017 (ThiNet), arXiv:1707.06342", frozenset({"activations"})
    ),
}


def find_criterion(name: str) -> Criterion:
    """A row of CRITERIA.

    Raises:
        InlayError: There is none of that name.
    """
    if name not in CRITERIA:
        raise BadInput(f"unknown criterion {name!r}; choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def score_units(
    name: str, model: nn.Module, groups: list[Group], evidence: Evidence, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """The score of each unit, by group, on the CPU in float64; the values of different layers can be compared.

    Raises:
        InlayError: An unknown criterion, or one that does not suit the model.
    """
    criterion = find_criterion(name)
    scores = {}
    for group in groups:
        values = criterion.score(Material(model, group, evidence, generator)).double().cpu()
        scores[group.name] = values if criterion.comparable else values / max(float(values.mean()), 1e-30)
    return scores
