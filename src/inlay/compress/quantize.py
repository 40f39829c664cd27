"""Write a model in fewer bits, in the mode that a probe on this machine and this model found to pay: `inlay quantize`.

No mode is trusted: 8 bits were 3.9 times as fast as float32 on one CPU and 25 times slower on another, and changed no
label of one model and 9 of 10 of another. So speed and answers of each are measured first.
"""

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.cpu import name_cpu
from inlay.compress.card import PROBE_HEADER, describe_conditions, format_probe
from inlay.compress.export import Exported, check_export_folder, export_source, write_export
from inlay.compress.graph import Graph, GraphModel, complete_inputs, import_runtime
from inlay.compress.int8 import INT8_MODES, count_calibrated, has_vnni, prepare_graph, quantize_graph
from inlay.compress.probe import PASSES, TURNS, Answers, Row, collect_answers, time_by_turns
from inlay.compress.source import Source, load_source
from inlay.compress.torch_modes import TORCH_MODES, TORCHAO, check_torch_mode, convert_in_torch
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.tasks.evaluation import Training, align_columns

TORCH, FLOAT32 = "float32 (torch)", "float32"  # what modes are compared with: the model as it is, and its graph
FAMILIES = {
    "dynamic": [name for name, mode in INT8_MODES.items() if not mode.static],
    "static": [name for name, mode in INT8_MODES.items() if mode.static],
    "bfloat16": ["bfloat16"],
    "torchao": list(TORCHAO),
}
SLOW = 4  # a mode that takes so many times as long as float32 in torch is not asked for its answers


@dataclass(frozen=True)
class Quantized:
    """What was chosen and written.

    Attributes:
        exported: The folder, its mode and its size.
        probe: What was measured of every mode, as in export.json.
    """

    exported: Exported
    probe: dict[str, Any]

    def __str__(self) -> str:
        rows = {row["mode"]: row for row in self.probe["rows"]}
        chosen, plain = rows[self.exported.mode], rows[TORCH]
        return (
            f"{self.exported}: {chosen['speedup']:.2f} times as fast as float32 in torch, accuracy "
            f"{plain['accuracy']:.4f} before and {chosen['accuracy']:.4f} after, agreement {chosen['agreement']:.4f}"
        )


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    calibrate: str | Path,
    base: str | Path | None = None,
    mode: str = "auto",
    max_drop: float = 0.01,
    min_agreement: float = 0.95,
    examples: int = 64,
    compare: int = 256,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> Quantized:
    """Probe modes of fewer bits, and write the fastest that keeps the answers of float32; nothing where none pays.

    A mode pays if it is faster than the graph in float32, its accuracy on held-out examples drops by at most
    `max_drop`, and at least `min_agreement` of its answers there are those of float32. Speed is that of one input, with
    the threads that torch uses now: by CPU time where that is one, which other load on the machine lengthens little.
    The folder is one of `export`, which `load_exported` reads; the whole table is on its card and in export.json.

    Args:
        source: An embedded base, the folder of a model or of an adapter, or the Hub id of one.
        output: The folder to write; it appears whole or not at all.
        calibrate: Labelled data, in a form that the recipes of the task take. Its training examples fix the scales of
            activations, and others, held out of them, are compared.
        base: Of an adapter; default: the one that it names.
        mode: auto: every mode that fits the model; dynamic, static, bfloat16 or torchao: those of one kind; or one by
            its name, such as int8-static-percentile.
        max_drop: Largest drop of accuracy, 0 to 1.
        min_agreement: Least share of equal answers, 0 to 1.
        examples: How many calibrate, at least 8.
        compare: How many held-out examples are compared at most.
        seed: Chooses both.
        show: Called with the table, whether a mode is chosen or not.

    Raises:
        InlayError: As `export`; data of other labels; an unknown mode; no mode pays.
    """
    _check_arguments(mode, max_drop, min_agreement, examples, compare)
    folder = check_export_folder(output)
    import_runtime()
    loaded = load_source(source, base)
    if loaded.task.graph_module:
        raise Unsupported(
            f"{loaded.name!r} is for {loaded.task.name}, whose answers are no classes that could be compared; "
            "`inlay export` writes it in float32."
        )
    calibration = load_batches(loaded, str(calibrate), examples, seed, held_out=False)
    held_out = load_batches(loaded, str(calibrate), compare, seed, held_out=True)
    rows = split_rows(loaded, calibration)
    rows = rows[: count_calibrated(len(rows))]
    if not rows:
        raise BadInput(f"{str(calibrate)!r} has fewer than 8 training examples, too few to calibrate; give more.")
    with tempfile.TemporaryDirectory() as work:
        workshop = Workshop(loaded, Path(work), rows)
        models, failed = workshop.make_modes(choose_modes(mode, loaded))
        table = measure_modes(loaded, models, held_out)
        for row in table:
            row.bytes = workshop.count_bytes(row.mode)
        chosen = judge_modes(table, max_drop, min_agreement)
        probe = {
            "data": str(calibrate),
            "calibrated": len(rows),
            "compared": sum(len(batch["labels"]) for batch in held_out),
            "seed": seed,
            "max_drop": max_drop,
            "min_agreement": min_agreement,
            "cpu": name_cpu(),
            "threads": torch.get_num_threads(),
            "repeats": (TURNS - 1) * PASSES,
            "rows": [row.to_dict() for row in [*table, *failed]],
        }
        if show is not None:
            show(format_table(probe))
        if chosen is None:
            raise ComputationFailed(_explain_none(loaded, table, failed, folder))
        exported = write_export(folder, loaded, chosen.mode, workshop.files(chosen.mode), probe=probe)
    return Quantized(exported, probe)


def _check_arguments(mode: str, max_drop: float, min_agreement: float, examples: int, compare: int) -> None:
    known = ["auto", *FAMILIES, *INT8_MODES, *TORCHAO]
    if mode not in known:
        raise BadInput(f"unknown mode {mode!r}; choose one of {', '.join(known)}.")
    for name, value in (("max_drop", max_drop), ("min_agreement", min_agreement)):
        if not 0 <= value <= 1:
            raise BadInput(f"{name} must be 0 to 1, got {value}.")
    if count_calibrated(examples) < 1 or compare < 1:
        raise BadInput(
            f"examples must be at least 8 to calibrate, and compare at least 1, got {examples} and {compare}."
        )


def choose_modes(mode: str, source: Source) -> list[str]:
    """The names of the modes to probe.

    For texts, whose inputs have any length, auto leaves out the static ones.
    """
    if mode in FAMILIES:
        return FAMILIES[mode]
    if mode != "auto":
        return [mode]
    chosen = [*FAMILIES["dynamic"], *(() if source.task.token_inputs else FAMILIES["static"])]
    for name in TORCH_MODES:
        try:
            check_torch_mode(name)
        except Unsupported:  # without torchao its modes are left out unless they are asked for
            continue
        chosen.append(name)
    return chosen


def load_batches(source: Source, data: str, count: int, seed: int, *, held_out: bool) -> list[dict[str, Tensor]]:
    """Labelled examples of the source's own task in batches; training examples, or those that are held out of them.

    Raises:
        InlayError: Data of other labels, or none of that task.
    """
    training = Training.from_metrics(source.metrics)
    labelled = source.task.load_labelled(source, data, count, seed, training, held_out=held_out)
    state = random.getstate()
    random.seed(seed)
    try:
        items = [labelled.view[i] for i in range(min(count, len(labelled.view)))]
    finally:
        random.setstate(state)
    return [labelled.collate(items[i : i + labelled.rows]) for i in range(0, len(items), labelled.rows)]


def split_rows(source: Source, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Inputs of one row each, as the graph takes them."""
    return [
        {name: value[i : i + 1] for name, value in batch.items() if name != "labels"}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


class Workshop:
    """A folder in which each mode is made, in a folder of its own.

    Args:
        source: The model.
        folder: An empty one.
        rows: Inputs of one row each, for calibration.
    """

    def __init__(self, source: Source, folder: Path, rows: list[dict[str, Tensor]]) -> None:
        self.source, self.folder, self.rows = source, folder, rows
        (folder / FLOAT32).mkdir()
        self.graph = export_source(source, folder / FLOAT32)
        self.plain = self._open(self.graph)
        self.prepared: Path | None = None

    def make_modes(self, names: list[str]) -> tuple[dict[str, nn.Module], list[Row]]:
        """A model for each mode and both forms of float32, and a row for each mode that could not be made."""
        models: dict[str, nn.Module] = {TORCH: self.source.model, FLOAT32: self.plain}
        failed = []
        for name in names:
            try:
                models[name] = self._make_mode(name)
            except Exception as error:  # a quantiser fails in any way; then there is no such mode of this model
                said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
                failed.append(Row(name, verdict=f"failed: {said}"))
        return models, failed

    def _make_mode(self, name: str) -> nn.Module:
        if name in TORCH_MODES:
            if not self.source.origin.get("merged", True):
                raise Unsupported("the adapter is not merged, so that torch has no plain model to load")
            return convert_in_torch(copy.deepcopy(self.source.model), name)
        if self.prepared is None:
            (self.folder / "prepared").mkdir()
            self.prepared = prepare_graph(self.graph, self.folder / "prepared")
        (self.folder / name).mkdir()
        rows = [complete_inputs(row, self.plain.graph.inputs) for row in self.rows]
        files = quantize_graph(self.prepared, INT8_MODES[name], rows, self.folder / name, reduce_range=not has_vnni())
        return self._open(files[0])

    def _open(self, graph: Path) -> GraphModel:
        model: GraphModel = GraphModel(self.source.model.config, Graph(graph)).eval()
        return model

    def files(self, mode: str) -> list[Path]:
        """Of the graph of a mode; none where torch computes it."""
        return [] if mode in (TORCH, *TORCH_MODES) else sorted((self.folder / mode).iterdir())

    def count_bytes(self, mode: str) -> int:
        """Of the files that a mode takes; with torchao they hold float32."""
        if files := self.files(mode):
            return sum(path.stat().st_size for path in files)
        held = sum(parameter.numel() for parameter in self.source.model.parameters())
        return held * (2 if mode == "bfloat16" else 4)


def measure_modes(source: Source, models: dict[str, nn.Module], held_out: list[dict[str, Tensor]]) -> list[Row]:
    """A row for each mode, without its verdict: speed by turns, then the answers to held-out examples."""
    one = {name: value[:1] for name, value in held_out[0].items() if name != "labels"}
    speeds = time_by_turns(models, one)
    plain: Answers = collect_answers(source.task, models[TORCH], held_out)
    table = []
    for name, model in models.items():
        speed = speeds[name]
        row = Row(name, speed.median_ms, speed.p10_ms, speed.p90_ms, speed.cpu_ms, speed.cost_ms)
        row.speedup = speeds[TORCH].cost_ms / speed.cost_ms
        if speed.cost_ms <= SLOW * speeds[TORCH].cost_ms:
            answers = plain if name == TORCH else collect_answers(source.task, model, held_out)
            row.agreement, row.accuracy = answers.agree(plain), answers.accuracy
        table.append(row)
    return table


def judge_modes(table: list[Row], max_drop: float, min_agreement: float) -> Row | None:
    """Write the verdict into each row, and return the mode that is chosen: the fastest that pays."""
    rows = {row.mode: row for row in table}
    plain, graph = rows[TORCH], rows[FLOAT32]
    paying = []
    for row in table:
        if row.mode in (TORCH, FLOAT32):
            row.verdict = "compared with"
        elif row.agreement is None or row.accuracy is None:
            row.verdict = "refused: far slower than float32, answers not compared"
        elif plain.accuracy - row.accuracy > max_drop:  # type: ignore[operator]
            row.verdict = f"refused: accuracy drops by {plain.accuracy - row.accuracy:.4f}"  # type: ignore[operator]
        elif row.agreement < min_agreement:
            row.verdict = f"refused: {1 - row.agreement:.1%} of the answers differ"
        elif row.cost_ms >= min(graph.cost_ms, plain.cost_ms):  # type: ignore[operator,type-var]
            row.verdict = "not faster than float32"
        else:
            row.verdict = "pays"
            paying.append(row)
    chosen = min(paying, key=lambda row: row.cost_ms or 0.0, default=None)
    if chosen is not None:
        chosen.verdict = "chosen"
    return chosen


def _explain_none(source: Source, table: list[Row], failed: list[Row], folder: Path) -> str:
    told = "; ".join(f"{row.mode}: {row.verdict}" for row in [*table, *failed] if row.verdict != "compared with")
    return (
        f"no mode pays for {source.name!r} on this machine ({told}). Nothing was written to {folder}; use `inlay "
        "export`, or allow more by max_drop and min_agreement."
    )


def format_table(probe: dict[str, Any]) -> str:
    """A probe as text for a terminal."""
    return "\n".join([*align_columns([PROBE_HEADER, *format_probe(probe["rows"])]), describe_conditions(probe)])
