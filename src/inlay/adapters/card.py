"""The model card (README.md) of a saved adapter."""

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from inlay.adapters.curve import CURVE, drawable
from inlay.adapters.method_names import citation, method_name, places
from inlay.adapters.tables import cost_section, table
from inlay.errors import InlayError

_TASKS = {
    "image-classification": "AutoModelForImageClassification",
    "text-generation": "AutoModelForCausalLM",
    "mask-generation": "AutoModelForMaskGeneration",
    "volume-segmentation": "AutoModelForMaskGeneration",
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
_KINDS = {"rouge_l": "rouge"}  # where the Hub's name of a metric is another one
_DATA = {
    "builtin:digits": "Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998, UCI, through scikit-learn), "
    "CC BY 4.0",
}
_LIMITS = {
    "image-classification": "It names one of its labels for any picture, also for one that shows something else; its "
    "probabilities have not been calibrated.",
    "text-generation": "What it writes can be fluent and wrong; check it before others rely on it.",
    "mask-generation": "Its masks answer a point or a box; objects unlike those of the training data may be missed.",
    "volume-segmentation": "It is no medical device and has not been validated for clinical use; scanners, protocols "
    "and patients unlike those of the training data can give wrong masks without a sign.",
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
    """Markdown with the Hub's YAML header: base, method, data, quality, cost, limits, and how to load it.

    Args:
        record: What the safetensors metadata says: base, task, labels, preprocessing.
        config: adapter_config.json.
        metrics: metrics.json; its `license` (of the adapter, such as apache-2.0) goes into the header.
    """
    base, task = record["base"], record["task"]
    dataset = metrics.get("dataset") or "unknown data"
    method = method_name(config)
    title = f"{method} of {_short(base['name'])} on {_short(dataset)}"
    scores = _scores(metrics)
    sections = [
        f"# {title}",
        f"{method} adapter of {_linked(base['name'])}{_revision(base)} for {task}, trained on "
        f"{_linked(dataset, 'datasets/')}.",
        "## Results",
        table(("metric", "value"), [(_metric(split, key), f"{value:.4f}") for split, key, value in scores])
        or "Not measured.",
        *([f"![Loss and scores by step]({CURVE})"] if drawable(metrics.get("history")) else []),
        "## Cost",
        *cost_section(metrics.get("cost", {})),
        "## Load",
        "Checked against the base it was trained on:",
        f"```python\n{_USE[task]}\n```",
        "With peft alone, which checks nothing:",
        _peft_snippet(record, config["peft_type"]),
        *_inputs(record),
        "## Method",
        places(record, config),
        "## Data",
        _licence(dataset),
        "## Training",
        table(
            ("setting", "value"),
            [(k, f"`{_told(v)}`") for k, v in metrics.get("training", {}).items() if v is not None],
        )
        or "Not recorded.",
        (f"Trained by {_told(metrics['trained_by'])}. " if metrics.get("trained_by") else "")
        + f"Versions: {', '.join(f'{k} {v}' for k, v in metrics.get('versions', {}).items())}.",
        "## Limits",
        _limits(record, metrics),
        "## Citation",
        citation(config),
    ]
    return f"---\n{_header(record, config, metrics, title).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def for_repository(text: str, repo: str, inside: str = "", licence: str | None = None) -> str:
    """A card as it stands in a repository: with its name where FOLDER was, and with the licence that was given.

    Args:
        text: The card.
        repo: user/name.
        inside: The adapter's folder in it, where it holds several.
        licence: Of the adapter, such as apache-2.0.

    Raises:
        InlayError: Its header is no YAML table; the licence is no name that the Hub could know.
    """
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise InlayError(f"expected a licence as the Hub names it, such as apache-2.0 or mit, got {licence!r}.")
    if inside:
        text = text.replace('(base, "FOLDER")', f'(base, "{repo}", subfolder="{inside}")')
    text = text.replace('"FOLDER"', f'"{repo}/{inside}"'.replace('/"', '"'))
    if text.startswith("---") or licence:
        try:
            read = ModelCard(text, ignore_metadata_errors=True)
        except (ValueError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise InlayError(
                f"the header of the card is not as the Hub reads it: {said}. Mend it, or save anew."
            ) from None
        if licence:
            read.data["license"] = licence
            text = str(read)
    return text


def _header(record: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any], title: str) -> ModelCardData:
    """What the Hub shows beside the card, and finds it by."""
    base, task, dataset = record["base"], record["task"], metrics.get("dataset") or "unknown data"
    known = _on_hub(base["name"])
    results = [
        EvalResult(
            task,
            dataset if _on_hub(dataset) else _short(dataset),
            _short(dataset),
            _KINDS.get(key, key),
            value,
            dataset_split=split,
            metric_name=_METRICS.get(key, key),
        )
        for split, key, value in _scores(metrics)
    ]
    return ModelCardData(
        base_model=base["name"] if known else None,
        base_model_relation="adapter" if known else None,
        datasets=[dataset] if _on_hub(dataset) and "/" in dataset else None,
        library_name="peft",
        license=metrics.get("license"),
        pipeline_tag={"volume-segmentation": "image-segmentation"}.get(task, task),
        tags=["inlay", config["peft_type"].lower(), base["model_type"], f"base:{_told(base['name'])}"],
        model_name=title,
        eval_results=results or None,
    )


def _scores(metrics: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Split, metric and value of all that was measured."""
    return [
        (split, key, value)
        for split in ("validation", "test")
        for key, value in (metrics.get(split) or {}).items()
        if isinstance(value, int | float)
    ]


def _licence(dataset: str) -> str:
    if dataset in _DATA:
        return f"`{dataset}`: {_DATA[dataset]}."
    if dataset.startswith("builtin:"):
        return f"`{dataset}`: generated by inlay's own code, Apache-2.0."
    if _on_hub(dataset) and "/" in dataset:
        return f"{_linked(dataset, 'datasets/')}: see its page for what it is and under which licence."
    return f"`{_told(dataset)}`: its licence was not recorded."


def _limits(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    seed = metrics.get("training", {}).get("seed")
    lines = [
        _LIMITS[record["task"]],
        f"It fits `{_told(record['base']['name'])}` alone, whose own limits and biases it keeps.",
    ]
    if _scores(metrics):
        run = "Its scores are of one run" + (f" (seed {seed})" if seed is not None else "")
        chosen = "; those of `validation` also chose its best step" if metrics.get("training") else ""
        lines.append(f"{run}, on held-out examples of the same data{chosen}.")
    return "\n".join(f"- {line}" for line in lines)


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
    else:
        said = _pixels(settings)
    named = ", ".join(f"{i} = {label}" for i, label in enumerate(labels[:50]))
    if labels:
        named += " ..." if len(labels) > 50 else ""
        return ["## Labels", named, *([said] if said else [])]
    if record["task"] == "mask-generation":
        said = (
            "Points `x, y`, inside or outside of what is meant, and boxes `x0, y0, x1, y1`, in pixels of the picture."
        )
        return ["## Prompts", said]
    read = f"Prompt and completion had at most {settings['max_length']} tokens of the base's tokenizer."
    if settings.get("chat"):
        said = (
            "Prompts are conversations, written with the base's chat template; a text alone is what a user says first, "
            f"and what the adapter adds is the assistant's answer. {read}"
        )
        return ["## Prompts", said]
    return [
        "## Prompts",
        f"A prompt is followed by `{json.dumps(settings['separator'])}` in front of its completion. {read}",
    ]


def _pixels(settings: dict[str, Any]) -> str:
    """What an image processor does, in one sentence; nothing for settings that are no image processor's."""
    size, steps = settings.get("size") or {}, []
    if isinstance(size, dict) and size and settings.get("do_resize"):
        steps.append("resized to " + " x ".join(f"{v}" for v in size.values() if isinstance(v, int)) + " pixels")
    if settings.get("do_rescale"):
        steps.append(f"scaled by {settings.get('rescale_factor', 1):.4g}")
    if settings.get("do_normalize"):
        means, spreads = ([round(x, 4) for x in settings.get(key) or []] for key in ("image_mean", "image_std"))
        steps.append(f"normalised by the means {means} and the deviations {spreads}")
    return f"Pictures are {', '.join(steps)}." if steps else ""


def _short(name: str) -> str:
    """The last part of a name or path."""
    return name.rstrip("/").rpartition("/")[2].removeprefix("builtin:") or name


def _on_hub(name: str) -> bool:
    """True for `user/name` or a canonical Hub name; embedded bases and folders have no page to link to."""
    files = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".gz")
    form = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    return form is not None and not name.endswith(files) and not Path(name).exists()


def _linked(name: str, kind: str = "") -> str:
    return f"[`{name}`](https://huggingface.co/{kind}{name})" if _on_hub(name) and "/" in name else f"`{_told(name)}`"


def _told(value: Any) -> Any:
    """A setting as the world may read it: of a path on this machine its last part."""
    return _short(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


def _revision(base: dict[str, Any]) -> str:
    return f" (revision `{base['revision'][:12]}`)" if base.get("revision") else ""


def _peft_snippet(record: dict[str, Any], kind: str) -> str:
    base, count = record["base"], len(record["labels"])
    held = base["precision"] if base["precision"] in ("float16", "bfloat16") else "float32"
    options = [f'dtype="{held}"']  # without it transformers takes that of the file
    if count and record["task"] == "image-classification":
        options = [f"num_labels={count}", "ignore_mismatched_sizes=True", *options]
    if base.get("revision"):
        options.append(f'revision="{base["revision"]}"')
    own = [f"import inlay  # makes {kind} known to peft; without it: KeyError: '{kind}'"] if "INLAY" in kind else []
    lines = [*own, "from peft import PeftModel", f"from transformers import {_TASKS[record['task']]}"]
    where = f'"{base["name"]}"'
    if base["name"].startswith("builtin:"):
        lines.append("from inlay.bases.load import resolve  # only the folder of the embedded base")
        where = f"resolve({where})"
    load, given = f"base = {_TASKS[record['task']]}.from_pretrained", ", ".join([where, *options])
    short = len(f"{load}({given})") <= 120  # ruff, which looks at the cards of adapters_hub too, breaks longer lines
    lines += [
        "",
        f"{load}({given})" if short else f"{load}(\n    {given}\n)",
        'model = PeftModel.from_pretrained(base, "FOLDER").eval()',
    ]
    note = ""
    if base["model_type"].startswith("mobilenet"):
        note = (
            "\n\ntransformers' MobileNets read the stride of a convolution before they call it, which peft's wrapper"
            " does not have: `import inlay` first gives it those."
        )
    return "```python\n" + "\n".join(lines) + "\n```" + note
