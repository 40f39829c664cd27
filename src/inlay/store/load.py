"""Load an adapter onto the base that it fits, or say in one sentence why it does not."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from inlay._peft import adapter_shapes, fill, inject, known_method
from inlay.arch import head_modules
from inlay.errors import InlayError
from inlay.models import Bits, Dtype, load_base, load_processor, processor_from
from inlay.store import golden
from inlay.store.file import CONFIG, WEIGHTS, AdapterFile, read_adapter
from inlay.store.sketch import TOLERANCE, distance, precision_of, sketch


@dataclass
class LoadedAdapter:
    """An adapter on its base, ready to use.

    Attributes:
        model: The PeftModel in eval mode.
        processor: The image processor that it was trained with.
        labels: Class names in the order of the logits.
        file: What was read from disk.
        verified: True if base, tensors and golden output were checked; False for a folder that only peft has written.
        deviation: Relative difference to the golden output; None if there is none.
    """

    model: PeftModel | PreTrainedModel
    processor: Any
    labels: list[str]
    file: AdapterFile
    verified: bool
    deviation: float | None

    def merge(self) -> "LoadedAdapter":
        """Fold the adapter into the base's weights: the same outputs without the adapter's latency.

        Raises:
            InlayError: The base is quantised, where merging would lose much of the adapter, or it is merged already.
        """
        if not isinstance(self.model, PeftModel):
            raise InlayError("this adapter is merged already.")
        kind = precision_of(self.model)
        if kind != "float32":
            raise InlayError(
                f"merging into {kind} weights would round the adapter away; load the base in float32 first."
            )
        self.model = self.model.merge_and_unload(safe_merge=True)
        return self


def load_adapter(
    path: str | Path,
    base: str | PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    bits: Bits | None = None,
) -> LoadedAdapter:
    """Load an adapter, its head, labels and preprocessing, and check that they compute what they computed when saved.

    Args:
        path: A folder, or a Hub id.
        base: A name for `load_base`, or a model (it is wrapped in place); default: the base that the adapter names.
        revision: Of the adapter, for a Hub id.
        dtype: Of the base, where it is loaded here.
        bits: 8 or 4, where it is loaded here.

    Raises:
        InlayError: Whatever `read_adapter` finds; a method that this peft does not know; a base of another structure or
            with other weights; tensors that are missing, superfluous or of another shape; NaN; another golden output.
    """
    file = read_adapter(_fetch(path, revision))
    _check_method(file)
    model = base if isinstance(base, PreTrainedModel) else _load_base(file, base, dtype, bits)
    if file.record:
        _check_base(file, model)
        model = _with_head(model, file)
    weights = load_file(file.folder / WEIGHTS)
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InlayError(f"the tensor {key!r} of adapter {file.name!r} holds NaN or Inf; it cannot be used.")
    settings = file.record.get("preprocessing")
    processor = processor_from(settings) if settings else load_processor(model.name_or_path)
    labels = file.labels or [model.config.id2label[i] for i in sorted(model.config.id2label)]
    adapted = _attach(file, model, weights)
    off = _check_golden(file, adapted, processor)
    return LoadedAdapter(adapted, processor, labels, file, bool(file.record), off)


def _load_base(file: AdapterFile, name: str | None, dtype: Dtype, bits: Bits | None) -> PreTrainedModel:
    """The base that was asked for, or the one that the adapter names, at the revision that it was trained on."""
    pinned = file.record.get("base", {}).get("revision") if name is None else None
    if not (name or file.base_name):
        raise InlayError(f"adapter {file.name!r} names no base; give base=.")
    return load_base(name or file.base_name, labels=file.labels or None, dtype=dtype, bits=bits, revision=pinned)


def _fetch(path: str | Path, revision: str | None) -> Path:
    """A local folder as it is; anything of the form user/name from the Hub or its cache, safetensors only."""
    folder = Path(path).expanduser()
    text = str(path)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "~", "/")):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InlayError(f"there is no folder {text!r}, and the Hub does not give it ({reason}).") from error


def _check_method(file: AdapterFile) -> None:
    if not known_method(file.config["peft_type"]):
        raise InlayError(
            f"adapter {file.name!r} is of the method {file.config['peft_type']!r}, which neither this inlay nor this "
            "peft knows: upgrade them."
        )


def _check_base(file: AdapterFile, base: PreTrainedModel) -> None:
    """Structure first, as it gives the clearer sentence; then the weights."""
    stored, config = file.record["base"], base.config
    name = f"adapter {file.name!r} was trained on {stored['name']}"
    for what, found in (
        ("model_type", config.model_type),
        ("blocks", getattr(config, "num_hidden_layers", None)),
        ("width", getattr(config, "hidden_size", None)),
    ):
        if stored[what] != found:
            raise InlayError(
                f"{name} ({what.replace('_', ' ')} {stored[what]}), but this base has {found}. Load it on that base."
            )
    found_sketch = sketch(base)
    for what in ("weights", "parameters"):
        if stored["sketch"][what] != found_sketch[what]:
            kind = "weight matrices" if what == "weights" else "parameters"
            raise InlayError(
                f"{name} ({stored['sketch'][what]:,} {kind}), but this base has {found_sketch[what]:,}. "
                "Load it on that base."
            )
    off = distance(stored["sketch"], found_sketch)
    limit = max(TOLERANCE[precision_of(base)], TOLERANCE[stored["precision"]])
    if off > limit:
        raise InlayError(
            f"{name}, but this base has other weights of the same shape (sketches {off:.3f} apart, {limit} allowed). "
            "Load it on the base it names, or retrain it."
        )


def _with_head(base: PreTrainedModel, file: AdapterFile) -> PreTrainedModel:
    """Give a base that was loaded for other labels a head of the adapter's size; its weights come from the file."""
    labels, config = file.labels, base.config
    if len(labels) != config.num_labels:
        for name in head_modules(base):
            head = base.get_submodule(name)
            if not isinstance(head, torch.nn.Linear):
                raise InlayError(
                    f"this base was loaded with {config.num_labels} labels, adapter {file.name!r} has {len(labels)}: "
                    "load it with load_base(name, labels=...)."
                )
            fresh = torch.nn.Linear(head.in_features, len(labels), dtype=head.weight.dtype, device=head.weight.device)
            base.set_submodule(name, fresh.requires_grad_(False))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    base.num_labels = len(labels)
    return base


def _attach(file: AdapterFile, base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PeftModel:
    """Inject the adapter without allocating it, compare names and shapes with the file, then fill it."""
    try:
        config = PeftConfig.from_pretrained(str(file.folder))
        model = inject(base, copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InlayError(f"{file.folder / CONFIG} does not fit this base: {str(error).splitlines()[0]}") from error
    expected = adapter_shapes(model)
    missing, superfluous = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    heads = [name for name in file.record.get("head", []) if any(f".{name}." in key for key in missing)]
    if heads:
        raise InlayError(
            f"adapter {file.name!r} lacks its head {heads[0]!r} ({len(missing)} tensors missing); get it again."
        )
    if missing or superfluous:
        parts = [f"lacks {len(missing)} tensors ({min(missing)})"] if missing else []
        parts += [f"has {len(superfluous)} that no module takes ({min(superfluous)})"] if superfluous else []
        raise InlayError(f"adapter {file.name!r} does not fit its config on this base: it {' and '.join(parts)}.")
    for key in sorted(expected):
        if expected[key] != tuple(weights[key].shape):
            raise InlayError(
                f"adapter {file.name!r} does not fit its config on this base: {key} should be {expected[key]}, "
                f"the file has {tuple(weights[key].shape)}."
            )
    fill(model, weights)
    return model.to(next(p for p in base.parameters() if p.is_floating_point()).device).eval()


def _check_golden(file: AdapterFile, model: PeftModel, processor: Any) -> float | None:
    stored = file.record.get("golden")
    if not stored:
        return None
    off = golden.deviation(stored, golden.output(model, processor))
    limit = max(golden.TOLERANCE[precision_of(model)], golden.TOLERANCE[file.record["base"]["precision"]])
    if off > limit:
        raise InlayError(
            f"adapter {file.name!r} loads, but its output differs by {off:.2g} (relative) from the one stored with it, "
            f"{limit} allowed: its config or its base was changed since it was saved."
        )
    return off
