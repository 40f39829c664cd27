"""Write a trained adapter as one folder."""

import functools
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from inlay.adapters import golden
from inlay.adapters.base_as_loaded import check_base_as_loaded
from inlay.adapters.card import make_card
from inlay.adapters.config import find_base_changing_init
from inlay.adapters.curve import CURVE, draw_curve, is_drawable
from inlay.adapters.file import CARD, CONFIG, FORMAT, METRICS, WEIGHTS, hash_config, read_adapter
from inlay.adapters.sketch import find_precision, sketch
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, describe_parts, find_layers, find_stored_key, fits_pipeline
from inlay.bases.batch_norm import is_batch_norm
from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.load import find_head, find_size
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.files.atomic import write_json, writing
from inlay.files.tensor_header import sign
from inlay.methods._peft import (
    PeftModel,
    acts_as_saved,
    base_modules,
    find_changed_weights,
    find_tied_modules,
    set_adapter_values,
)
from inlay.tasks import task_of_model
from inlay.tasks.task import Task
from inlay.train.sharding import is_sharded


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    *,
    processor: Any,
    metrics: dict[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    groups: dict[str, dict[str, int]] | None = None,
) -> Path:
    """Save the active adapter, its head and all that loading must check, as a folder that plain peft reads too.

    adapter_config.json and adapter_model.safetensors are peft's; the safetensors metadata holds the base's
    name, revision and sketch, the labels, the preprocessing and a golden output. LoRA of a text-to-image pipeline goes
    into pytorch_lora_weights.safetensors instead, which diffusers loads. README.md is the model card, metrics.json
    holds `metrics`. An earlier adapter of that name is replaced in one step. Under several processes the
    main one writes.

    Args:
        model: A transformers model wrapped by `get_peft_model`.
        folder: Where; its last part is the adapter's name.
        processor: The image processor, TextProcessor or VolumeProcessor that it was trained with.
        metrics: `validation` and `test` (scores), `dataset`, `cost`, `training`, `license`, and `history` (rows of an
            evaluation each, drawn as training.png): shown in the card, stored in metrics.json. `trained_by` is who
            trains, by default what INLAY_AUTHOR says in the environment.
        dtype: Of the numbers in the file. With float16, half the size, the model's own adapter is rounded too, so that
            it computes what was saved.
        groups: Of labels, in a combination of classifiers, as in `AdapterFile.groups`.

    Raises:
        InlayError: Not a peft model, or one that does not compute what would be saved; weights or outputs that are not
            finite; a new head that is no part of the adapter; a base that is not as it was loaded, or of a class that
            its task does not load (`check_base_as_loaded`); a folder that holds something else.
    """
    folder = Path(folder).expanduser()
    _check_model(model)
    task = task_of_model(model.get_base_model(), processor)
    check_base_as_loaded(model, task)
    if dtype not in ("float32", "float16") or (dtype == "float16" and model.active_peft_config.is_prompt_learning):
        raise BadInput(
            f"dtype must be float32, or float16 where the adapter is no prompt or prefix of peft; got {dtype!r}."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / CONFIG).is_file():
        raise BadInput(f"{folder} exists and is not an adapter; give another folder.")
    if not PartialState().is_main_process:
        return folder
    metrics = {**read_author(), **(metrics or {}), "versions": read_versions()}
    with writing(folder) as new:
        model.save_pretrained(str(new), selected_adapters=[model.active_adapter], save_embedding_layers=False)
        if model.active_adapter != "default":  # peft puts any other name in a folder of its own
            for path in (new / model.active_adapter).iterdir():
                path.rename(new / path.name)
            (new / model.active_adapter).rmdir()
        weights = task.leave_out_idle_layers(load_file(new / WEIGHTS))
        if dtype == "float16":
            weights = {key: value.half() if value.dtype == torch.float32 else value for key, value in weights.items()}
            set_adapter_values(model, weights)
        _check_weights(model, weights)
        config = _complete_config(new / CONFIG, model.active_peft_config)
        path = new / WEIGHTS
        if is_diffusion(model.get_base_model().config) and fits_pipeline(config, weights):
            path.unlink()
            path = new / PIPELINE_WEIGHTS
            config = _name_layers(new / CONFIG, config, weights)
        record = {
            **_record(model, processor, task),
            "config": hash_config(config),
            **({"tasks": groups} if groups else {}),
        }
        if not np.isfinite(record["golden"]).all():
            raise ComputationFailed("the model's output on the golden input is NaN or Inf; nothing was saved.")
        parts = describe_parts(path, config, {key: tuple(value.shape) for key, value in weights.items()})
        stored = {find_stored_key(path, key): value for key, value in weights.items()}
        told = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
        path.write_bytes(sign(to_bytes(stored, {"format": "pt", **parts, "inlay": told})))
        write_json(new / METRICS, metrics)
        if is_drawable(metrics.get("history")):
            draw_curve(metrics["history"], new / CURVE)
        (new / CARD).write_text(make_card(record, config, metrics), encoding="utf-8")
        read_adapter(new)
    return folder


def _check_model(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise BadInput(f"save_adapter takes a model wrapped by get_peft_model, got {type(model).__name__}.")
    if is_sharded(model):
        raise BadInput(
            "the weights of this model are in shards (FSDP2, ZeRO 3), as a loop of your own leaves them; train it with "
            "inlay.fit, which joins them, or load accelerator.get_state_dict(model) into a model that is not sharded."
        )
    if not acts_as_saved(model):
        raise BadInput(
            "save_adapter takes a model with one active adapter, neither merged nor disabled: undo that first."
        )
    if init := find_base_changing_init(model.active_peft_config.to_dict()):
        raise Unsupported(
            f"the initialisation {init!r} changes the base, so the adapter would be wrong on the base as it was; "
            "train with another init_lora_weights, such as True."
        )


def _check_weights(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ComputationFailed(f"the weight {key!r} holds NaN or Inf; nothing was saved.")
    base = model.get_base_model()
    heads = find_head(base)
    if getattr(base, "new_head", False) and not all(any(f".{head}." in key for key in weights) for head in heads):
        raise BadInput(
            f"the head is new, but no part of this adapter, so it would be lost; train it: modules_to_save={heads}."
        )


def read_author() -> dict[str, str]:
    """Who trains, where INLAY_AUTHOR says so: nobody is named unasked, neither the login nor the Hub's user."""
    name = os.environ.get("INLAY_AUTHOR", "").strip()
    return {"trained_by": name} if name else {}


def read_versions() -> dict[str, str]:
    """The versions that decide what an adapter computes."""
    names = ("inlay", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: _read_version(name) for name in names}}


_read_version = functools.cache(version)  # it parses the package's whole description: a tenth of saving a small adapter


def _record(model: PeftModel, processor: Any, task: Task) -> dict[str, Any]:
    base = model.get_base_model()
    config = base.config
    task.check_method(model)
    blocks, width = find_size(config)
    norms = sum(is_batch_norm(module) for _, module in base_modules(model, originals=True))
    changed = find_changed_weights(model)
    return {
        "format": FORMAT,
        "task": task.name,
        "base": {
            "name": base.name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "model_type": config.model_type,
            "blocks": blocks,
            "width": width,
            "precision": find_precision(model),
            "sketch": sketch(model),
            **({"batch_norms": norms} if norms else {}),
        },
        "labels": task.labels(base, model.active_peft_config),
        "head": find_head(base) if task.classifies else [],
        "preprocessing": task.processor_settings(processor),
        "golden": golden.compute_output(model, processor, task),
        **({"changed_weights": changed} if changed else {}),
    }


def _complete_config(path: Path, method: Any) -> dict[str, Any]:
    """peft's config with the names of the modules that are tied to the embedding, by the setting they belong to.

    Sets become lists in a random order in it: they are sorted, so that equal adapters are equal files. Lists stay as
    they are: the order of classes tells which output is whose.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    for setting, names in find_tied_modules(method).items():
        if isinstance(config[setting], list):  # a pattern matches them already
            config[setting] = sorted({*config[setting], *names})
    for key, value in config.items():
        if isinstance(value, list) and isinstance(getattr(method, key, None), set):
            config[key] = sorted(value)
    write_json(path, config)
    return config


def _name_layers(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config with the full name of each layer: `to_q` says nothing of the part of a pipeline."""
    config = {
        **config,
        "target_modules": find_layers(weights),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }
    write_json(path, config)
    return config
