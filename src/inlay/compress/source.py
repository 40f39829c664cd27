"""What is to be exported or quantised: a model with its head, or an adapter merged into its base."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.adapters.file import expand_path
from inlay.adapters.hub.fetch import fetch_if_adapter
from inlay.adapters.load import load_adapter
from inlay.adapters.summary import describe_method
from inlay.bases.load import resolve_base
from inlay.compress.exported import is_exported
from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.files.bounded_json import parse_json
from inlay.tasks.adapter import route_group
from inlay.tasks.base import load_base, read_task
from inlay.tasks.task import Task


@dataclass
class Source:
    """A model that is ready to compute, and what is told of it.

    Attributes:
        name: The last part of the name that was given.
        model: On the CPU, in float32 and eval mode.
        task: What it is for, a row of TASKS.
        processor: What makes its inputs.
        labels: Class names in the order of the logits; none for what has no classes.
        origin: Where it is from: its name, and of an adapter its base, its method and the digest of its file.
        metrics: What the adapter's metrics.json says; empty for a model.
        groups: Of labels, in a combination of classifiers, as in `AdapterFile.groups`.
    """

    name: str
    model: Any
    task: Task
    processor: Any
    labels: list[str]
    origin: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, int]] = field(default_factory=dict)

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """Class names of one group of a combination, and which logits stand for them; None: all classes.

        Raises:
            InlayError: There is no such group.
        """
        return route_group(f"{self.name!r}", self.labels, self.groups, group)


def load_source(name: str | Path, base: str | Path | None = None) -> Source:
    """A model, or an adapter merged into its base; an adapter that no weight can stand for stays on it.

    Args:
        name: An embedded base, the folder of a model or of an adapter, or the Hub id of one.
        base: Of an adapter; default: the one that it names.

    Raises:
        InlayError: What `load_adapter` or `load_base` says; neither is there; a base for a model; an adapter that
            makes another model of its base.
    """
    if is_exported(expand_path(name)):
        raise BadInput(f"{name} is exported already; give the model or the adapter that it was exported from.")
    if folder := fetch_if_adapter(name):
        return _load_adapter(folder, base)
    if base is not None:
        raise BadInput(f"{name} is a model and goes on no base; leave base out.")
    return _load_model(str(name))


def _load_adapter(folder: Path, base: str | Path | None) -> Source:
    loaded = load_adapter(folder, base, device="cpu")
    loaded.task.check_merges(loaded.name)
    if loaded.model.active_peft_config.is_prompt_learning:
        raise Unsupported(
            f"adapter {loaded.name!r} puts tokens in front of its inputs, which no weight can stand for and peft adds "
            "outside of the model; export an adapter of another method."
        )
    try:
        model, merged = loaded.merge().model, True
    except Unsupported:
        model, merged = loaded.model.get_base_model(), False
    file = loaded.file
    origin = {
        "adapter": loaded.name,
        "method": describe_method(file),
        "merged": merged,
        "base": str(base or file.base_name),
        "digest": file.digest,
    }
    labels = loaded.labels if loaded.task.classifies else []
    return Source(loaded.name, model, loaded.task, loaded.processor, labels, origin, file.metrics, file.groups)


def _load_model(name: str) -> Source:
    model, task = load_base(name, device="cpu"), read_task(name)
    labels = task.labels(model, None) if task.classifies else []
    where = resolve_base(name)
    report = _read_report(Path(where))
    processor = task.load_processor(name, report.get("preprocessing") or None)
    return Source(Path(where).name, model, task, processor, labels, {"model": name}, report.get("metrics") or {})


def _read_report(folder: Path) -> dict[str, Any]:
    """What inlay wrote next to a model that it merged or pruned: its preprocessing, and how it was trained."""
    for name in ("pruning.json", "merge.json"):
        if (folder / name).is_file():
            try:
                found = parse_json((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise DamagedFile(f"{folder / name} is damaged ({error}); write the folder again.") from None
            return found if isinstance(found, dict) else {}
    return {}
