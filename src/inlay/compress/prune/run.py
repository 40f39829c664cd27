"""What `inlay prune` does: prune, heal, compare, and write the folder with what was found."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from inlay.adapters.file import CONFIG
from inlay.bases.device import Device
from inlay.bases.widths import find_groups
from inlay.compress.prune.carry import carry_adapter, prune_under_adapter
from inlay.compress.prune.heal import heal
from inlay.compress.prune.masks import mask_weights
from inlay.compress.prune.pruning import Pruned, prune
from inlay.compress.prune.save import PruneReport, check_output, save_pruned
from inlay.compress.prune.target import Target, compare_latencies, inputs_of_one
from inlay.compress.prune.trained import TrainedModel, load_trained
from inlay.errors import BadInput
from inlay.files.outputs import check_replaceable_folder
from inlay.options import check_options, option
from inlay.tasks.evaluation import Evaluation


@dataclass
class Pruning:
    """How a model is pruned and healed."""

    target: str = option("macs=0.5", "macs, params or latency, as a share of what the model has.")
    criterion: Literal["taylor", "activation", "thinet", "apoz", "batchnorm", "l1", "l2", "random"] = option(
        "taylor", "What tells which units matter."
    )
    scope: Literal["global", "local"] = option(
        "global", "Layers compete for units, or each keeps the same share, as transformers can load by itself."
    )
    units: list[str] = option([], "Kinds of units that may go: mlp, heads, expansion ...; default: all.")
    compensate: bool = option(False, "Fit what reads the kept units by least squares.")
    steps: int = option(1, "Steps in which the target is reached.", least=1)
    examples: int = option(256, "Training examples that the criterion looks at.", least=1)
    heal_steps: int = option(0, "Train a LoRA for so many steps afterwards, and merge it.", least=0)
    heal_share: float = option(0.05, "Share of the pruned model's parameters that this LoRA may have.", above=0, most=1)
    heal_batch: int = option(32, "Examples in such a step.", least=1)
    heal_rate: float | None = option(
        None, "Its learning rate; default: that of LoRA in METHODS, less on a wide base.", above=0
    )
    compare: bool = option(False, "Prune at random as well, and train a model of this size from scratch.")
    limit: int | None = option(None, "Score so many examples at most.", least=1)
    seed: int = option(0, "Of what is drawn.", least=0, below=2**32)

    def __post_init__(self) -> None:
        check_options(self)

    def settings(self) -> dict[str, Any]:
        """What `prune` takes."""
        names = ("target", "criterion", "scope", "compensate", "steps", "examples", "seed")
        return {**{name: getattr(self, name) for name in names}, "kinds": self.units}


def prune_to_folder(
    model: str | Path,
    data: str,
    output: str | Path,
    how: Pruning,
    *,
    base: str | Path | None = None,
    carry: str | Path | None = None,
    device: Device | None = None,
) -> PruneReport:
    """Prune a model, or an adapter folded into its base; heal it; score it before and after; write it.

    Args:
        model: As `load_trained` takes it.
        data: Labelled data of its task. The part that training does not use is scored.
        output: The folder to write.
        how: How.
        base: Of an adapter, instead of the one that it names.
        carry: Leave the adapter out of the pruned base, and write it into this folder, cut to what is left.
        device: As in `load_base`.

    Raises:
        InlayError: What `prune`, `heal` and `carry_adapter` say; a folder that holds something else.
    """
    check_output(output)
    if carry is not None:
        if how.heal_steps or how.compare:
            raise BadInput(
                "a carried adapter belongs to the pruned base as it is, which is not compared; leave carry out, or "
                "heal_steps and compare."
            )
        check_replaceable_folder(carry, CONFIG, "an adapter")
    Target.parse(how.target)
    trained = load_trained(model, base=base, device=device)
    find_groups(trained.model, how.units)  # before the first score
    scores = {"dense": trained.score(data, limit=how.limit)}
    if carry is not None:
        bare, pruned = prune_under_adapter(model, data, base=base, **how.settings())
        scores["pruned, with the adapter"] = pruned.trained.score(data, limit=how.limit)
        report = _describe(trained, bare, scores)
        save_pruned(bare.trained, output, report)
        carry_adapter(model, output, carry, base=base)
        return report
    pruned = prune(trained, data, **how.settings())
    made, healing = _heal_and_score(pruned.trained, data, how, scores, "pruned", "healed")
    if how.compare:
        drawn = prune(trained, data, **{**how.settings(), "criterion": "random"})
        _heal_and_score(drawn.trained, data, how, scores, "random", "random, healed")
        steps = how.heal_steps or 60
        fresh = heal(pruned.trained, data, way="scratch", steps=steps, batch_size=how.heal_batch, seed=how.seed)
        scores[f"from scratch, {steps} steps"] = fresh.trained.score(data, limit=how.limit)
    report = replace(_describe(trained, pruned, scores), healing=healing)
    save_pruned(made, output, report)
    return report


def mask_to_folder(
    model: str | Path,
    data: str,
    output: str | Path,
    *,
    sparsity: float,
    criterion: str = "magnitude",
    scope: Literal["global", "local"] = "local",
    examples: int = 256,
    limit: int | None = None,
    base: str | Path | None = None,
    device: Device | None = None,
) -> PruneReport:
    """Set single weights of a model to zero, score it before and after, and write it. Arguments as in `mask_weights`.

    Raises:
        InlayError: What `mask_weights` says; a folder that holds something else.
    """
    check_output(output)
    trained = load_trained(model, base=base, device=device)
    masked = mask_weights(trained, data, sparsity=sparsity, criterion=criterion, scope=scope, examples=examples)
    scores = {"dense": trained.score(data, limit=limit), "masked": masked.trained.score(data, limit=limit)}
    remark = "The zeros take no time away: the tensors have their shapes, and the same products are computed."
    report = PruneReport(masked.facts, scores=scores, remarks=[remark])
    save_pruned(masked.trained, output, report)
    return report


def _heal_and_score(
    trained: TrainedModel, data: str, how: Pruning, scores: dict[str, Evaluation], before: str, after: str
) -> tuple[TrainedModel, dict[str, Any] | None]:
    scores[before] = trained.score(data, limit=how.limit)
    if not how.heal_steps:
        return trained, None
    healed = heal(
        trained,
        data,
        share=how.heal_share,
        steps=how.heal_steps,
        batch_size=how.heal_batch,
        learning_rate=how.heal_rate,
        seed=how.seed,
    )
    scores[after] = healed.trained.score(data, limit=how.limit)
    return healed.trained, healed.facts


def _describe(trained: TrainedModel, pruned: Pruned, scores: dict[str, Evaluation]) -> PruneReport:
    inputs = inputs_of_one(trained.task.random_inputs(trained.model, trained.processor))
    before, after = compare_latencies([trained.model, pruned.trained.model], inputs)
    remark = (
        f"Latency of one input on {after['device']}, threads: {after['threads']}: {before['least_ms']:.2f} ms before, "
        f"{after['least_ms']:.2f} ms after, the least of several turns; their medians were {_range(before)} and "
        f"{_range(after)} ms."
    )
    facts = {**pruned.facts, "latency": {"before": before, "after": after}}
    return PruneReport(facts, pruned.kept, scores, remarks=[remark])


def _range(latency: dict[str, Any]) -> str:
    low, high = latency["medians_ms"]
    return f"{low:.2f} to {high:.2f}"
