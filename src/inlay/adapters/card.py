"""The model card (README.md) of a saved adapter."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from inlay.adapters.curve import CURVE, is_drawable
from inlay.adapters.method_names import cite_method, describe_sites, name_method
from inlay.adapters.notes import mark_section
from inlay.adapters.study import SECTION, write_study_section
from inlay.adapters.tables import describe_cost, make_table
from inlay.adapters.weight_file import fits_pipeline
from inlay.errors import BadInput, DamagedFile
from inlay.tasks import TASKS

_METRICS = {
    "accuracy": "Accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "dice": "Dice",
    "f1": "Macro F1",
    "loss": "Validation loss",
    "matthews": "Matthews correlation",
    "mean_iou": "Mean IoU",
    "perplexity": "Perplexity",
    "rouge_l": "ROUGE-L",
}
_KINDS = {"rouge_l": "rouge"}  # where the Hub's name of a metric is another one
_DATA = {
    "builtin:digits": "Optical Recognition of Handwritten Digits (Alpaydin & Kaynak 1998, UCI, through scikit-learn), "
    "CC BY 4.0",
}


def make_card(record: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML header: base, method, data, quality, cost, limits, and how to load it.

    Args:
        record: What the safetensors metadata says: base, task, labels, preprocessing.
        config: adapter_config.json.
        metrics: metrics.json; its `license` (of the adapter, such as apache-2.0) goes into the header, and what a
            `study` found has a section.
    """
    base, task = record["base"], record["task"]
    dataset = metrics.get("dataset") or "unknown data"
    method = name_method(config)
    title = f"{method} of {_short(base['name'])} on {_short(dataset)}"
    scores = _scores(metrics)
    sections = [
        f"# {title}",
        f"{method} adapter of {_linked(base['name'])}{_revision(base)} for {task}, trained on "
        f"{_linked(dataset, 'datasets/')}.",
        "## Results",
        make_table(("metric", "value"), [(_metric(split, key), f"{value:.4f}") for split, key, value in scores])
        or "Not measured.",
        *([f"![Loss and scores by step]({CURVE})"] if is_drawable(metrics.get("history")) else []),
        *([mark_section(SECTION, study)] if (study := write_study_section(metrics)) else []),
        "## Cost",
        *describe_cost(metrics.get("cost", {})),
        "## Load",
        "Checked against the base it was trained on:",
        f"```python\n{TASKS[task].usage}\n```",
        f"With {_find_library(record, config)} only, which checks nothing:",
        _pipeline_snippet(record)
        if _find_library(record, config) == "diffusers"
        else _peft_snippet(record, config["peft_type"]),
        *_inputs(record),
        "## Method",
        describe_sites(record, config),
        "## Data",
        _licence(dataset),
        "## Training",
        make_table(
            ("setting", "value"),
            [(k, f"`{_told(v)}`") for k, v in metrics.get("training", {}).items() if v is not None],
        )
        or "Not recorded.",
        (f"Trained by {_told(metrics['trained_by'])}. " if metrics.get("trained_by") else "")
        + f"Versions: {', '.join(f'{k} {v}' for k, v in metrics.get('versions', {}).items())}.",
        "## Limits",
        _limits(record, metrics),
        "## Citation",
        cite_method(config),
    ]
    return f"---\n{_header(record, config, metrics, title).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def address_card(text: str, repo: str, inside: str = "", licence: str | None = None) -> str:
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
        raise BadInput(
            f"unknown form of a licence: {licence!r}; give it as the Hub names it, such as apache-2.0 or mit."
        )
    if inside:
        text = text.replace('(base, "FOLDER")', f'(base, "{repo}", subfolder="{inside}")')
        text = text.replace('lora_weights("FOLDER")', f'lora_weights("{repo}", subfolder="{inside}")')
    text = text.replace('"FOLDER"', f'"{repo}/{inside}"'.replace('/"', '"'))
    if text.startswith("---") or licence:
        try:
            read = ModelCard(text, ignore_metadata_errors=True)
        except (ValueError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise DamagedFile(
                f"the header of the card is not as the Hub reads it: {said}. Correct it, or save the adapter again."
            ) from None
        if licence:
            read.data["license"] = licence
            text = str(read)
    return text


def _header(record: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any], title: str) -> ModelCardData:
    """What the Hub shows next to the card, and finds it by."""
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
        library_name=_find_library(record, config),
        license=metrics.get("license"),
        pipeline_tag=TASKS[task].hub_tag,
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
        TASKS[record["task"]].limits,
        f"It fits only `{_told(record['base']['name'])}`, whose own limits and biases it keeps.",
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
    """The classes, and how inputs are given, in the words of the task."""
    heading, *said = TASKS[record["task"]].describe_inputs(record)
    return [f"## {heading}", *said]


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


def _find_library(record: dict[str, Any], config: dict[str, Any]) -> str:
    """Which library loads the adapter by itself: a LoRA of a text-to-image pipeline is stored for diffusers."""
    names = config.get("target_modules")
    keys = [f"{name}.lora_A.weight" for name in names] if isinstance(names, list) else []
    of_pipeline = record["base"]["model_type"] == "diffusion" and not config.get("modules_to_save")
    return "diffusers" if of_pipeline and fits_pipeline(config, keys) else "peft"


def _pipeline_snippet(record: dict[str, Any]) -> str:
    base = record["base"]
    revision = f', revision="{base["revision"]}"' if base.get("revision") else ""
    where, own = f'"{base["name"]}"', []
    if base["name"].startswith("builtin:"):
        own, where = (
            ["from inlay import resolve_base  # only the folder of the embedded base"],
            f"resolve_base({where})",
        )
    lines = [
        "from diffusers import DiffusionPipeline",
        *own,
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({where}{revision})",
        'pipeline.load_lora_weights("FOLDER")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _peft_snippet(record: dict[str, Any], kind: str) -> str:
    base, count, task = record["base"], len(record["labels"]), TASKS[record["task"]]
    held = base["precision"] if base["precision"] in ("float16", "bfloat16") else "float32"
    options = [f'dtype="{held}"']  # without it transformers takes that of the file
    if count and task.classifies:
        options = [f"num_labels={count}", "ignore_mismatched_sizes=True", *options]
    if base.get("revision"):
        options.append(f'revision="{base["revision"]}"')
    own = [f"import inlay  # makes {kind} known to peft; without it: KeyError: '{kind}'"] if "INLAY" in kind else []
    lines = [*own, "from peft import PeftModel", f"from transformers import {task.auto_class}"]
    where = f'"{base["name"]}"'
    if base["name"].startswith("builtin:"):
        lines.append("from inlay import resolve_base  # only the folder of the embedded base")
        where = f"resolve_base({where})"
    load, given = f"base = {task.auto_class}.from_pretrained", ", ".join([where, *options])
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
