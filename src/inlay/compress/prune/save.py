"""Write a pruned model as a folder that loads as a base: weights, config, processor, card and pruning.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.adapters.file import CARD
from inlay.adapters.tables import make_table
from inlay.bases.pruned import is_stock
from inlay.combine.merge import compute_outputs, save_quietly
from inlay.compress.prune.trained import TrainedModel
from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_replaceable_folder
from inlay.tasks.base import load_base
from inlay.tasks.evaluation import Evaluation, Training, title

REPORT = "pruning.json"


@dataclass(frozen=True)
class PruneReport:
    """What is told of a pruned model, in pruning.json and on its card.

    Attributes:
        facts: Of `Pruned` or of the masks.
        kept: By group, the units of the model before that it has; none where weights were set to zero.
        scores: By row of the comparison, such as dense, pruned and healed, in this order.
        healing: Of `Healed`.
        remarks: Sentences.
    """

    facts: dict[str, Any]
    kept: dict[str, list[int]] = field(default_factory=dict)
    scores: dict[str, Evaluation] = field(default_factory=dict)
    healing: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without the numbers of the kept units."""
        scores = {row: evaluation.summary() for row, evaluation in self.scores.items()}
        return {**self.facts, "scores": scores, **({"healing": self.healing} if self.healing else {})}

    def summary(self, folder: str | Path) -> str:
        """What is printed once the folder is written."""
        before, after = self.facts["before"], self.facts["after"]
        lines = [f"{folder}: {describe(self.facts)}"]
        for name in before:
            share = f"{after[name] / before[name]:.4f}"
            lines.append(f"{_COSTS[name]}: {_number(before[name])} -> {_number(after[name])} ({share})")
        if "widths" in self.facts:
            kinds = self.facts["widths"]
            lines += [f"{kind}: {', '.join(map(str, widths))}" for kind, widths in kinds.items()]
        lines += self.remarks
        if self.healing:
            lines.append(describe_healing(self.healing))
        if self.scores:
            name = next(iter(next(iter(self.scores.values())).scores))
            wide = max(map(len, self.scores))
            first = next(iter(self.scores.values()))
            lines.append(f"{title(name)} on {first.data} ({first.split}, {first.count:,}):")
            lines += [f"  {row:<{wide}}  {found.scores[name]}" for row, found in self.scores.items()]
        return "\n".join(lines)


def check_output(folder: str | Path) -> Path:
    """The folder of a pruned model, if it can be made or replaced.

    Raises:
        InlayError: It holds something else.
    """
    return check_replaceable_folder(folder, REPORT, "a model that inlay pruned")


def save_pruned(trained: TrainedModel, folder: str | Path, report: PruneReport) -> Path:
    """Save a pruned model with its processor, card and pruning.json; the folder appears whole or not at all.

    Raises:
        InlayError: A folder that holds something else; a model that computes something else once it is loaded again.
    """
    out = check_output(folder)
    inputs = trained.task.random_inputs(trained.model, trained.processor)
    device = next(trained.model.parameters()).device
    placed = {name: value.to(device) for name, value in inputs.items()}
    with writing(out) as new:
        trained.model.config._name_or_path = ""
        save_quietly(trained.model, new)
        trained.task.save_processor(trained.processor, new)
        written = load_base(new, task=trained.task.name, device=str(device))
        before, after = compute_outputs(trained.model, placed), compute_outputs(written, placed)
        error = float((after - before).norm() / before.norm().clamp(min=1e-12))
        if not error < 1e-5:
            raise ComputationFailed(
                f"the pruned model computes something else once it is loaded again (relative difference {error:.2g}); "
                "nothing was saved."
            )
        write_json(new / REPORT, make_record(trained, report))
        (new / CARD).write_text(make_card(trained, report, out.name), encoding="utf-8")
    return out


def make_record(trained: TrainedModel, report: PruneReport) -> dict[str, Any]:
    """What pruning.json holds; what it says of the training keeps training examples out of later scores."""
    healed_on = {"dataset": report.facts["data"]} if report.healing else {}
    return {
        **report.to_dict(),
        "metrics": {**Training.select(trained.metrics), **healed_on},
        "labels": trained.labels,
        "preprocessing": trained.task.processor_settings(trained.processor),
        "kept": report.kept,
    }


def read_record(folder: str | Path) -> dict[str, Any]:
    """What pruning.json of a folder holds.

    Raises:
        InlayError: There is none.
    """
    path = Path(folder).expanduser() / REPORT
    if not path.is_file():
        raise BadInput(f"{folder} is no model that inlay pruned: it has no {REPORT}.")
    return json.loads(path.read_text(encoding="utf-8"))


def table_of_scores(scores: dict[str, Evaluation]) -> str:
    """The rows of a comparison as a Markdown table: every score with its interval."""
    names = list(next(iter(scores.values())).scores) if scores else []
    rows = [(row, *(str(found.scores[name]) for name in names)) for row, found in scores.items()]
    return make_table(("model", *map(title, names)), rows)


def table_of_costs(facts: dict[str, Any]) -> str:
    """What the model costs before and after, as a Markdown table."""
    before, after = facts["before"], facts["after"]
    rows = [
        (_COSTS[name], _number(before[name]), _number(after[name]), f"{after[name] / before[name]:.4f}")
        for name in before
    ]
    return make_table(("cost", "before", "after", "share"), rows)


_COSTS = {
    "macs": "multiply-accumulates",
    "params": "parameters",
    "latency": "latency, ms",
    "nonzero": "weights that are not zero",
}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def make_card(trained: TrainedModel, report: PruneReport, name: str) -> str:
    """README.md of the folder."""
    facts, task = report.facts, trained.task
    source = facts["source"].get("adapter") or facts["source"]["model"]
    source = source.rstrip("/").rpartition("/")[2] if source.startswith(("/", "~", ".")) else source
    lines = [
        "---",
        f"library_name: {'transformers' if is_stock(trained.model) else 'inlay'}",
        f"pipeline_tag: {task.hub_tag}",
        "tags: [inlay, pruned]",
        "---",
        f"# {name}",
        "",
        f"{source}, {describe(facts)}.",
        "",
        table_of_costs(facts),
        "",
    ]
    if report.scores:
        first = next(iter(report.scores.values()))
        data = facts["data"].rstrip("/").rpartition("/")[2]
        lines += [f"Scores on {data} ({first.split}, {first.count:,} {first.unit}s), with 95 % intervals:", ""]
        lines += [table_of_scores(report.scores), ""]
    if report.healing:
        lines += [describe_healing(report.healing), ""]
    lines += [f"{remark}\n" for remark in report.remarks]
    imports = f"from transformers import {task.auto_class}\n"
    load = f'model = {task.auto_class}.from_pretrained("{name}")'
    if not is_stock(trained.model):
        imports = "from inlay import load_base\n"
        load = f'model = load_base("{name}")  # its layers have different widths, which only inlay knows'
    return "\n".join([*lines, "```python", imports, load, "```", ""])


def describe(facts: dict[str, Any]) -> str:
    """What was pruned and how, as the rest of a sentence."""
    if "sparsity" in facts:
        return (
            f"with {facts['sparsity']:.0%} of its weights in linear layers and convolutions set to zero by "
            f"{facts['criterion']} ({facts['paper']})"
        )
    fitted = ", with the next layer fitted by least squares" if facts["compensate"] else ""
    times = f" in {facts['steps']} steps" if facts["steps"] > 1 else ""
    return (
        f"pruned{times} to {facts['target']} by the criterion {facts['criterion']} ({facts['paper']}), "
        f"{facts['scope']}{fitted}"
    )


def describe_healing(healing: dict[str, Any]) -> str:
    """How the model was trained after it was pruned."""
    ways = {
        "lora": f"by a LoRA of rank {healing.get('rank')}, which is merged",
        "full": "by training all its weights",
        "scratch": "from new weights",
    }
    return (
        f"Healed {ways[healing['way']]}: {healing['trained_parameters']:,} trained parameters ({healing['share']:.1%} "
        f"of the model), {healing['steps']} steps of {healing['batch_size']} examples."
    )
