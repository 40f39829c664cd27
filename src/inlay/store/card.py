"""The model card (README.md) of a saved adapter."""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

_TASKS = {
    "image-classification": "AutoModelForImageClassification",
    "text-generation": "AutoModelForCausalLM",
    "mask-generation": "AutoModelForMaskGeneration",
    "volume-segmentation": "AutoModelForMaskGeneration",
}
_METHODS = {
    "LORA": "LoRA",
    "INLAY_SPATIAL3D": "3D spatial",
    "PREFIX_TUNING": "Prefix tuning",
    "PROMPT_TUNING": "Prompt tuning",
    "INLAY_ATTENTION_PREFIX": "Attention prefix",
    "INLAY_BOTTLENECK": "Bottleneck",
    "INLAY_COMPOSITE": "Composite",
    "INLAY_PARTIAL": "Partial fine-tuning",
    "INLAY_VISUAL_PROMPT": "Visual prompt",
}
_METRICS = {
    "accuracy": "Accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "dice": "Dice",
    "f1": "Macro F1",
    "loss": "Validation loss",
    "mean_iou": "Mean IoU",
    "perplexity": "Perplexity",
    "rouge_l": "ROUGE-L",
}
_USE = {
    "image-classification": 'from inlay import load_adapter, predict\n\nadapter = load_adapter("FOLDER")\n'
    'print(predict(adapter, ["picture.png"]))',
    "text-generation": 'from inlay import generate, load_adapter\n\nadapter = load_adapter("FOLDER")\n'
    'print(generate(adapter.model, adapter.processor, ["a prompt"]))',
    "mask-generation": 'from inlay import load_adapter, predict_masks\n\nadapter = load_adapter("FOLDER")\n'
    'print(predict_masks(adapter, "picture.png", points=[(40, 60)]).masks.shape)',
    "volume-segmentation": 'from inlay import load_adapter, segment\n\nadapter = load_adapter("FOLDER")\n'
    'print(segment(adapter, "scan.nii.gz").volumes_ml)',
}


def card(record: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML header: base, method, data, quality, cost, and how to load it."""
    base, task = record["base"], record["task"]
    dataset = metrics.get("dataset") or "unknown data"
    method = method_name(config)
    title = f"{method} of {_short(base['name'])} on {_short(dataset)}"
    quality = [
        (split, key, value)
        for split in ("validation", "test")
        for key, value in (metrics.get(split) or {}).items()
        if isinstance(value, int | float)
    ]
    header = ModelCardData(
        base_model=base["name"] if _on_hub(base["name"]) else None,
        base_model_relation="adapter" if _on_hub(base["name"]) else None,
        library_name="peft",
        pipeline_tag={"volume-segmentation": "image-segmentation"}.get(task, task),
        tags=["inlay", config["peft_type"].lower(), base["model_type"], f"base:{base['name']}"],
        model_name=title,
        eval_results=[
            EvalResult(
                task,
                dataset,
                dataset,
                key,
                value,
                dataset_split=split,
                metric_name=_METRICS.get(key, key),
            )
            for split, key, value in quality
        ]
        or None,
    )
    sections = [
        f"# {title}",
        f"{method} adapter of `{base['name']}`{_revision(base)} for {task}, trained on `{dataset}`.",
        "## Results",
        _table(("metric", "value"), [(_metric(split, key), f"{value:.4f}") for split, key, value in quality])
        or "Not measured.",
        "## Cost",
        _table(
            ("measure", "value"),
            [(k.replace("_", " "), _number(v)) for k, v in metrics.get("cost", {}).items()],
        )
        or "Not measured.",
        "## Load",
        "Checked against the base it was trained on:",
        f"```python\n{_USE[task]}\n```",
        "With peft alone:",
        _peft_snippet(record, config["peft_type"]),
        *_inputs(record),
        "## Training",
        _table(("setting", "value"), [(k, f"`{v}`") for k, v in metrics.get("training", {}).items()])
        or "Not recorded.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in metrics.get("versions", {}).items()) + ".",
    ]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metric(split: str, key: str) -> str:
    name = _METRICS.get(key, key)
    return f"Test {name}" if split == "test" else name


def _inputs(record: dict[str, Any]) -> list[str]:
    """The classes, or how a prompt is given."""
    labels, settings = record["labels"], record["preprocessing"]
    if record["task"] == "volume-segmentation":
        labels = ["background", *labels]
        spacing = settings["spacing_mm"] and " x ".join(f"{s:g}" for s in settings["spacing_mm"])
        crop = " x ".join(map(str, settings["crop"]))
        said = f"Scans are turned to RAS, at {spacing or 'their own'} mm (D, H, W), and seen {crop} voxels at a time."
    named = ", ".join(f"{i} = {label}" for i, label in enumerate(labels[:50]))
    if labels:
        named += " ..." if len(labels) > 50 else ""
        return ["## Labels", named, *([said] if record["task"] == "volume-segmentation" else [])]
    if record["task"] == "mask-generation":
        said = (
            "Points `x, y`, inside or outside of what is meant, and boxes `x0, y0, x1, y1`, in pixels of the picture."
        )
        return ["## Prompts", said]
    return [
        "## Prompts",
        f"A prompt is followed by `{json.dumps(settings['separator'])}` and read with the base's tokenizer; prompt and "
        f"completion had at most {settings['max_length']} tokens.",
    ]


def method_name(config: dict[str, Any]) -> str:
    """What the method of an adapter_config.json is called; of a composite with its parts."""
    kind = str(config["peft_type"])
    name = _METHODS.get(kind, kind)
    parts = [method_name(part) for part in config.get("parts", [])]
    return f"{name} of {' and '.join(parts)}" if parts else name


def _short(name: str) -> str:
    """The last part of a name or path."""
    return name.rstrip("/").rpartition("/")[2].removeprefix("builtin:") or name


def _on_hub(name: str) -> bool:
    """True for `user/name` or a canonical Hub name; embedded bases and folders have no page to link to."""
    return not name.startswith(("builtin:", ".", "/", "~")) and name.count("/") <= 1


def _revision(base: dict[str, Any]) -> str:
    return f" (revision `{base['revision'][:12]}`)" if base.get("revision") else ""


def _peft_snippet(record: dict[str, Any], kind: str) -> str:
    base, count = record["base"], len(record["labels"])
    classes = (
        f", num_labels={count}, ignore_mismatched_sizes=True"
        if count and record["task"] == "image-classification"
        else ""
    )
    own = [f"import inlay  # makes {kind} known to peft; without it: KeyError: '{kind}'"] if "INLAY" in kind else []
    lines = [*own, "from peft import PeftModel", f"from transformers import {_TASKS[record['task']]}"]
    where = f'"{base["name"]}"'
    if base["name"].startswith("builtin:"):
        lines.append("from inlay.models import resolve  # only the folder of the embedded base")
        where = f"resolve({where})"
    lines += [
        "",
        f"base = {_TASKS[record['task']]}.from_pretrained({where}{classes})",
        'model = PeftModel.from_pretrained(base, "FOLDER").eval()',
    ]
    note = ""
    if base["model_type"].startswith("mobilenet"):
        note = (
            "\n\ntransformers' MobileNets read the stride of a convolution before they call it, which peft's wrapper"
            " does not have: run `from inlay._peft import mirror_convolutions; mirror_convolutions()` first."
        )
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if isinstance(value, float) else str(value)
