"""Fold an adapter into its base for good, measure what that costs, and save a model that needs neither inlay nor peft.

Weights are added in float32, whatever they were held in, and measured as they are stored: rounding them to fewer bits
can take away more than an adapter has put in, whose change of a weight is often smaller than a step of a coarse type.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from inlay.adapters.file import CARD
from inlay.adapters.load import LoadedAdapter, attach_adapter, load_adapter, load_own_base
from inlay.adapters.sketch import find_precision
from inlay.adapters.summary import describe_method
from inlay.adapters.weights import read_weights
from inlay.bases.load import Dtype
from inlay.bases.quantize import Quantize
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_replaceable_folder
from inlay.methods._peft import (
    base_modules,
    dequantize_weight,
    layers_disabled,
    merge_keeping_weights,
)
from inlay.tasks.base import load_base
from inlay.tasks.evaluation import Training

logger = logging.getLogger(__name__)

REPORT = "merge.json"
_FEW_BITS = ("Linear8bitLt", "Linear4bit")


@dataclass(frozen=True)
class Merged:
    """A merged model, and what merging has changed.

    Attributes:
        folder: Where it is.
        adapter: Name of the adapter.
        method: Its method and width.
        base: Name of its base.
        stored: How the weights are stored: float32, float16, bfloat16, 8bit or 4bit.
        effect: What the adapter changes, ‖unmerged - base‖ / ‖base‖ over the outputs, both with the adapter's head.
        error: What merging changes compared with that, ‖merged - unmerged‖ / ‖unmerged - base‖.
        inputs: On what both were measured: random or given inputs.
        bytes: Of the folder.
    """

    folder: Path
    adapter: str
    method: str
    base: str
    stored: str
    effect: float
    error: float
    inputs: str
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.adapter} ({self.method}) in {self.base}, {self.stored}, {self.bytes / 1e6:.1f} MB; "
            f"the adapter changes the outputs by {self.effect:.2%}, merging by {self.error:.2g} of that"
        )


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Dtype | None = None,
    quantize: Quantize | None = None,
    limit: float = 0.05,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Merged:
    """Save an adapter's base with the adapter folded in: a plain model with its head and labels, or a plain pipeline.

    The folder appears whole or not at all; an earlier merged model there is replaced. merge.json holds the report.

    Args:
        adapter: A folder or a Hub id; `load_adapter` checks it.
        out: The folder to write.
        base: Of the adapter; default: the one that it names.
        dtype: Of the stored weights; default: float32, or the bits of `quantize`.
        quantize: Merge into the weights that an 8-bit or 4-bit base stands for, as an adapter trained on such a base
            needs; without a dtype they are quantised again.
        limit: Largest error allowed, compared with the adapter's own effect.
        inputs: Tensors that the model takes, on which effect and error are measured; default: random ones.

    Raises:
        InlayError: What `load_adapter` says; a method that no weight can stand for; an error over the limit; a folder
            that holds something else.
    """
    out = Path(out).expanduser()
    _check_arguments(out, dtype, quantize, limit)
    loaded = load_adapter(adapter, base, device="cpu")
    model = loaded.model
    _check_merges(loaded)
    stored = quantize if quantize and dtype is None else dtype or "float32"
    if stored == quantize and not loaded.task.stores_few_bits:
        raise Unsupported(
            f"{loaded.task.base_noun} is not stored in {stored} when merged; give a dtype such as float16."
        )
    held = {"int8": "8bit", "nf4": "4bit"}.get(loaded.file.record.get("base", {}).get("precision"))
    if held and held != quantize:
        logger.warning("%s was trained on a base in %s: quantize=%r merges into those weights.", adapter, held, held)
    used = model  # the adapter as it is used unmerged
    if quantize:
        held_base = load_own_base(loaded.file, base, quantize=quantize, device="cpu")
        dequantize(held_base, model)
        if stored == quantize:
            loaded.task.complete_base(held_base)
            with suppress(Unsupported):  # whole weights, and DoRA in 8 bits, are used on what the bits stand for only
                used = attach_adapter(loaded.file, held_base, read_weights(loaded.file))
    batch = loaded.task.random_inputs(model, loaded.processor) if inputs is None else dict(inputs)
    with layers_disabled(used):
        plain = compute_outputs(used, batch)
    unmerged = compute_outputs(used, batch)
    known = {
        f"{name}.{leaf}"
        for name, module in base_modules(model, originals=True)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    merged, _ = merge_keeping_weights(model)
    if added := [name for name, _ in merged.named_parameters() if "." in name and name not in known]:
        raise Unsupported(
            f"merging adds {added[0]} to the model, which transformers drops when it loads it; use the adapter "
            "unmerged, or merge it in memory with load_adapter(...).merge()."
        )
    with writing(out) as new:
        _write_model(merged, new, stored, loaded)
        written = load_base(new, task=loaded.task.name)  # checks that transformers finds all weights
        off = float((compute_outputs(written, batch) - unmerged).norm())
        change = float((unmerged - plain).norm())
        effect = change / max(float(plain.norm()), 1e-12)
        error = off / change if effect > 1e-7 else math.inf
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        report = Merged(
            folder=out,
            adapter=loaded.file.name,
            method=describe_method(loaded.file),
            base=str(base or loaded.file.base_name),
            stored=stored,
            effect=effect,
            error=error,
            inputs="random" if inputs is None else "given",
            bytes=size,
        )
        if not error <= limit:
            raise ComputationFailed(_explain_refusal(report, limit))
        _write_report_and_card(report, new, loaded, written)
    return report


@torch.no_grad()
def compute_outputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits, SAM's masks and predicted IoU, or what a denoiser predicts: one after the other in float64."""
    output = model.eval()(**batch)
    found = [output[key] for key in ("logits", "pred_masks", "iou_scores", "prediction") if key in output]
    if not found:
        raise Unsupported(f"{type(model).__name__} gives neither logits nor masks, so merging cannot be measured.")
    return torch.cat([values.flatten().double() for values in found])


def dequantize(model: nn.Module, into: nn.Module) -> None:
    """Give the linear layers of `into`, in float32, the values that those of a base in few bits stand for."""
    targets = dict(base_modules(into))
    for name, module in base_modules(model):
        if type(module).__name__ in _FEW_BITS:
            target = targets[name]
            weight = dequantize_weight(module).to(target.weight.device, torch.float32)
            target.weight.data = (weight.T if type(target).__name__ == "Conv1D" else weight).contiguous()


def _check_arguments(out: Path, dtype: str | None, quantize: str | None, limit: float) -> None:
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise BadInput(f"unknown dtype {dtype!r}; choose one of float32, float16, bfloat16.")
    if quantize not in (None, "8bit", "4bit"):
        raise BadInput(f"unknown quantize {quantize!r}; choose one of 8bit, 4bit.")
    if not limit >= 0:
        raise BadInput(f"limit must be at least 0, not {limit}.")
    check_replaceable_folder(out, REPORT, "a model that inlay merged")


def _check_merges(loaded: LoadedAdapter) -> None:
    """What can be said before anything is computed."""
    model = loaded.model
    loaded.task.check_merges(loaded.name)
    if model.active_peft_config.is_prompt_learning:
        raise Unsupported("prompts and prefixes are tokens, which no weight can stand for; use the adapter unmerged.")
    if find_precision(model) in ("int8", "nf4"):
        raise BadInput("this base is stored in 8 or 4 bits; give the one that it was quantised from, and quantize.")
    if hasattr(model.base_model, "check_merge"):
        model.base_model.check_merge()


def _write_model(merged: PreTrainedModel, new: Path, stored: str, loaded: LoadedAdapter) -> None:
    """The model as it is to be stored, and what makes its inputs."""
    if stored in ("8bit", "4bit"):
        with tempfile.TemporaryDirectory() as whole:
            save_quietly(merged, Path(whole))
            few = load_base(whole, task=loaded.task.name, quantize=stored)  # type: ignore[arg-type]
            few.config._name_or_path = ""
            save_quietly(few, new)
    else:
        save_quietly(merged.to(getattr(torch, stored)), new)
    loaded.task.save_processor(loaded.processor, new)


def save_quietly(model: PreTrainedModel, folder: Path, values: dict[str, torch.Tensor] | None = None) -> None:
    """`save_pretrained` without its progress bar, which flashes by."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=values)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def _explain_refusal(report: Merged, limit: float) -> str:
    if math.isinf(report.error):
        return (
            f"adapter {report.adapter!r} changes nothing on these inputs, so the error of merging cannot be measured; "
            "give other inputs, or another adapter."
        )
    ways = {"float32": "use the adapter unmerged", "8bit": "give a dtype too, to store what these bits stand for"}
    ways |= {"float16": "store float32", "4bit": ways["8bit"]}
    return (
        f"merging {report.adapter!r} and storing {report.stored} would change the outputs by {report.error:.1%} of "
        f"what the adapter does ({limit:.0%} allowed): {ways.get(report.stored, ways['float16'])}, or raise the limit."
    )


def _write_report_and_card(report: Merged, new: Path, loaded: LoadedAdapter, model: nn.Module) -> None:
    """merge.json and the model card."""
    record = loaded.file.record
    facts = {**asdict(report), "folder": report.folder.name, "labels": loaded.labels}
    facts |= {"trained_on": record.get("base", {}), "preprocessing": record.get("preprocessing", {})}
    metrics = loaded.file.metrics
    facts |= {"metrics": {"validation": metrics.get("validation"), **Training.select(metrics)}}
    write_json(new / REPORT, facts)
    name = report.base if report.base.count("/") == 1 and not report.base.startswith((".", "/", "~")) else None
    head = ["---", f"library_name: {loaded.task.library}", f"pipeline_tag: {loaded.task.hub_tag}"]
    head += [f"base_model: {name}", "base_model_relation: finetune"] if name else []
    text = [
        *head,
        "---",
        f"# {report.folder.name}",
        "",
        f"The adapter {report.adapter} ({report.method}) merged into {report.base} by inlay, as {report.stored}.",
        "",
        f"On {report.inputs} inputs the adapter changes the outputs of its base by {report.effect:.2%}; merging has "
        f"changed them by {report.error:.2g} of that.",
        "",
        "```python",
        *loaded.task.loading_code(model, report.folder.name),
        "```",
        "",
    ]
    (new / CARD).write_text("\n".join(text), encoding="utf-8")


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report that `merge` wrote into the folder of a model.

    Raises:
        InlayError: A folder without merge.json.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise BadInput(f"{folder} is no model that inlay merged: it has no {REPORT}.")
    return json.loads(path.read_text(encoding="utf-8"))
