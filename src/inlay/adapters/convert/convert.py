"""Adapters that other programs wrote, or transformers 4, as adapters that load here.

    import_adapter("roberta_lora.bin", "imported", base="FacebookAI/roberta-base", alpha=16)

What a layer is called is asked of transformers, whose own renamings of old checkpoints are used; the numbers stay as
they are. What a file does not say (its base, alpha) is asked for, never guessed.
"""

import copy
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from inlay.adapters.base_weights import is_base_with, split_base_weights
from inlay.adapters.convert.factors import Factors, check_factors, check_finite, read_factors, read_tensors
from inlay.adapters.convert.pipelines import holds_pipeline_lora, read_pipeline_factors
from inlay.adapters.file import CONFIG, PICKLE, WEIGHTS, AdapterFile, read_adapter
from inlay.adapters.hub.fetch import fetch, fetch_folder
from inlay.adapters.load import LoadedAdapter, load_adapter
from inlay.adapters.patterns import check_patterns
from inlay.adapters.save import save_adapter
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, PREFIX, describe_parts, find_stored_key, fits_pipeline
from inlay.adapters.weights import read_weights
from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.load import explain_load_error, load_structure, read_config, resolve_base
from inlay.bases.sites import is_linear, linear_shape
from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported, WrongBase
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_output_folder
from inlay.tasks.base import load_base

PARTS = ("q", "k", "v")  # of a fused layer, in the order of its rows
_HEADS = ("classifier", "score", "fc", "head")


@dataclass
class Imported:
    """What an import made.

    Attributes:
        folder: The adapter.
        form: What it was.
        layers: How many are adapted.
        renamed: How many tensors have another name now.
        left_out: What else the source holds, and what takes that.
        checked: What the result was compared with: its base's weights, its base's structure, or nothing.
    """

    folder: Path
    form: str
    layers: int
    renamed: int
    left_out: list[str] = field(default_factory=list)
    checked: str = "nothing"


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    fused: Sequence[str] | None = None,
) -> Imported:
    """Convert an adapter, and compare it with its base as far as that is at hand.

    Where the base's weights are (a base of any task), the result carries a record and is verified from then on;
    otherwise it is what plain peft, or diffusers, would have saved.

    Args:
        source: A folder or Hub id of peft with names of an older transformers, or with adapter_model.bin of an older
            peft; a file of loralib; a file of diffusers, kohya or cloneofsimo for Stable Diffusion, or the folder or
            Hub id with diffusers' pytorch_lora_weights.safetensors.
        out: A new folder.
        base: Name, folder or Hub id of the base, where the source does not name it: of Stable Diffusion the whole
            pipeline. With CLIP's text encoder as base, the part of the text encoder becomes an adapter of that.
        alpha: Where the file does not say it (loralib, peft or diffusers without settings): ΔW = alpha / r · B·A.
        fused: Of loralib's fused layers: which of q, k and v are adapted, such as ("q", "v").

    Raises:
        InlayError: What is no LoRA, what lacks in the source, layers that the base does not have.
    """
    base = None if base is None else str(base)
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists; give a new folder.")
    check_output_folder(out)
    place = _find_place(source)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "adapter"
        folder.mkdir()
        if place.is_file():
            made, name = _from_file(place, folder, base, alpha, fused)
        else:
            if fused is not None:
                raise BadInput(f"{source} is an adapter of peft, which has no fused layers; leave fused out.")
            unpickled = _read_pickle(place, Path(work) / "tensors")
            file = read_adapter(unpickled or fetch(place if place.is_dir() else source))
            if alpha not in (None, file.config.get("lora_alpha")):
                raise BadInput(
                    f"the config of {source} says lora_alpha = {file.config.get('lora_alpha')}, so alpha={alpha:g} "
                    "would have no effect; leave it out."
                )
            made, name = _from_peft(file, folder, base)
        made.folder = out
        loaded = _load_on_base(name, folder) if made.checked == "its base's structure" else None
        if loaded is not None:
            metrics = {"imported": {"form": made.form, "from": place.name, "left_out": made.left_out}}
            save_adapter(loaded.model, out, processor=loaded.processor, metrics=metrics)
            made.checked = "its base's weights"
        else:
            with writing(out) as new:
                for path in folder.iterdir():
                    (new / path.name).write_bytes(path.read_bytes())
    return made


def _find_place(source: str | Path) -> Path:
    """The folder of an adapter with a config, or else the file; what is on the Hub is fetched."""
    place = Path(source).expanduser()
    if place.is_file():
        of_adapter = place.name in (WEIGHTS, PIPELINE_WEIGHTS, PICKLE) and (place.parent / CONFIG).is_file()
        return place.parent if of_adapter else place
    folder = fetch_folder(source)
    if (folder / PIPELINE_WEIGHTS).is_file() and not (folder / CONFIG).is_file():
        return folder / PIPELINE_WEIGHTS
    return place


def _read_pickle(folder: Path, out: Path) -> Path | None:
    """The adapter of an older peft with its tensors as safetensors; None where it has them, or is no such folder."""
    if not (folder / PICKLE).is_file() or not (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
        return None
    tensors, _ = read_tensors(folder / PICKLE)
    out = out / (folder.resolve().name or "adapter")
    out.mkdir(parents=True)
    (out / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    return out


def _from_peft(file: AdapterFile, folder: Path, base: str | None) -> tuple[Imported, str]:
    """Other names for the same tensors, and modules by their full names in the config."""
    config, name = file.config, base or file.base_name
    if config["peft_type"] != "LORA" or config.get("layer_replication"):
        raise Unsupported(f"adapter {file.name!r} is of the method {config['peft_type']}; inlay imports LoRA.")
    if not name:
        raise BadInput(f"adapter {file.name!r} names no base, so the new names of its layers are unknown; give --base.")
    skeleton = base_skeleton(name)
    weights = read_weights(file)
    names = _renaming(skeleton)
    moved = {key: PREFIX + names(key.removeprefix(PREFIX)) for key in weights}
    pipeline = is_diffusion(skeleton.config)
    if pipeline:
        moved = _name_part(moved, skeleton)
    sites = {_site(key): _site(moved[key]) for key in weights if ".lora_" in key}
    check_patterns(config, {site.removeprefix(PREFIX) for site in sites}, file.name)
    config = copy.deepcopy(config)
    config |= {"target_modules": sorted(new.removeprefix(PREFIX) for new in sites.values())}
    config |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    config["base_model_name_or_path"] = name
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = _follow(config.get(key) or {}, sites)
    _check_sites(file.name, skeleton, config["target_modules"])
    _write_tensors(folder, config, {moved[key]: value for key, value in weights.items()}, pipeline)
    write_json(folder / CONFIG, config)
    renamed = sum(old != new for old, new in moved.items())
    form = "peft, under names of an older transformers" if renamed else "peft"
    return Imported(folder, form, len(sites), renamed, checked="its base's structure"), name


def _name_part(moved: Mapping[str, str], skeleton: transformers.PreTrainedModel) -> dict[str, str]:
    """Keys of a UNet or transformer that peft has adapted by itself, under its name in the pipeline."""
    modules, denoiser = {name for name, _ in skeleton.named_modules()}, skeleton.config.denoiser
    named = {}
    for key, new in moved.items():
        name = new.removeprefix(PREFIX)
        inside = ".lora_" in new and f"{denoiser}.{_site(name)}" in modules
        named[key] = f"{PREFIX}{denoiser}.{name}" if inside else new
    return named


def _site(key: str) -> str:
    return key[: key.index(".lora_")]


def _follow(pattern: Mapping[str, Any], sites: Mapping[str, str]) -> dict[str, Any]:
    """What a pattern said of a layer, under its new name: the first that matches counts, as in peft."""
    told = {}
    for old, new in sites.items():
        for text, value in pattern.items():
            if re.match(rf"(.*\.)?({text})$", old.removeprefix(PREFIX)):
                told[re.escape(new.removeprefix(PREFIX))] = value
                break
    return told


def _from_file(
    path: Path, folder: Path, base: str | None, alpha: float | None, fused: Sequence[str] | None
) -> tuple[Imported, str]:
    tensors, metadata = read_tensors(path)
    check_finite(path, tensors)
    of_pipeline = holds_pipeline_lora(tensors)
    skeleton = None if base is None else _find_skeleton(base, of_pipeline)
    if of_pipeline:
        pipeline = skeleton if skeleton is None or is_diffusion(skeleton.config) else None
        found = read_pipeline_factors(path, tensors, metadata, pipeline)
        if skeleton is not None and pipeline is None:
            found = _take_text_encoder(path, found)
    else:
        found = read_factors(path, tensors)
    check_factors(path, found)
    base = _require_base_and_alpha(path, found, base, alpha, fused)
    names = str if skeleton is None or found.pipeline else _renaming(skeleton)
    layers = {names(f"{name}.weight").removesuffix(".weight"): factors for name, factors in found.layers.items()}
    alphas = {names(f"{name}.weight").removesuffix(".weight"): value for name, value in found.alphas.items()}
    whole = {names(key): value for key, value in found.whole.items()}
    if skeleton is not None:
        _check_sites(path.name, skeleton, layers)
    made, config = _plain_lora(path, found, layers, dict.fromkeys(layers, float(alpha or 0)) | alphas, fused, skeleton)
    heads = sorted({key.split(".")[0] for key in whole})
    if skeleton is not None:
        _check_shapes(path.name, skeleton, made, whole)
    made |= {f"{PREFIX}{key}": value.contiguous() for key, value in whole.items()}
    of_text_encoder = of_pipeline and not found.pipeline
    settings = LoraConfig(
        **config, base_model_name_or_path=base, modules_to_save=heads or None, inference_mode=True,
        task_type="FEATURE_EXTRACTION" if of_text_encoder else "SEQ_CLS" if "classifier" in heads else None,
    )  # fmt: skip
    settings.save_pretrained(str(folder))
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, {**saved, "target_modules": sorted(layers)})  # peft writes a set, in any order
    _write_tensors(folder, saved, made, found.pipeline)
    renamed = len(made) if of_pipeline else sum(key not in found.layers for key in layers)
    checked = "its base's structure" if skeleton is not None else "nothing: its base is not at hand"
    return Imported(folder, found.form, len(layers), renamed, found.left_out, checked), base


def _find_skeleton(base: str, of_pipeline: bool) -> transformers.PreTrainedModel | None:
    """The structure of a base; None for one that is not at hand: then nothing is compared with it."""
    try:
        return base_skeleton(base, "CLIPTextModel" if of_pipeline else None)
    except InlayError:
        if Path(base).is_dir() or base.startswith("builtin:"):
            raise
        return None


def _take_text_encoder(path: Path, found: Factors) -> Factors:
    """The part of CLIP's text encoder, under its own names."""
    start = "text_encoder."
    layers = {name.removeprefix(start): value for name, value in found.layers.items() if name.startswith(start)}
    if not layers:
        raise WrongBase(f"{path} adapts no text encoder, so its base is the whole pipeline; give that as --base.")
    layers = {name.removeprefix("text_model."): value for name, value in layers.items()}
    alphas = {
        name.removeprefix(start).removeprefix("text_model."): value
        for name, value in found.alphas.items()
        if name.startswith(start)
    }
    others = sum(len(value) for name, value in found.layers.items() if not name.startswith(start))
    left = [f"{others} tensors of the UNet (they take the pipeline as base)"] if others else []
    return Factors(found.form, layers, alphas, left_out=left + found.left_out)


def _require_base_and_alpha(
    path: Path, found: Factors, base: str | None, alpha: float | None, fused: Sequence[str] | None
) -> str:
    """The base's name; raises InlayError where that or alpha lacks, and for what would have no effect."""
    unknown = found.layers.keys() - found.alphas.keys()
    if alpha is not None and not unknown:
        raise BadInput(f"{path} holds the alpha of each layer, so alpha={alpha:g} would have no effect; leave it out.")
    if fused is not None and found.form != "loralib":
        raise BadInput(f"{path} is a LoRA of {found.form}, which has no fused layers; leave fused out.")
    lacking = []
    if base is None:
        hint = " (that of the whole pipeline, such as stable-diffusion-v1-5/stable-diffusion-v1-5)"
        lacking.append(f"the name of its base: --base{hint if found.pipeline else ''}")
    if alpha is None and unknown:
        lacking.append("alpha, by which its updates are scaled as alpha / r: --alpha")
    if base is None or lacking:
        raise BadInput(f"{path} is a LoRA of {found.form}, which lacks {'; '.join(lacking)}.")
    return base


def _write_tensors(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], pipeline: bool) -> None:
    """The file of a pipeline's LoRA, or of any other adapter."""
    path = folder / (PIPELINE_WEIGHTS if pipeline and fits_pipeline(config, tensors) else WEIGHTS)
    parts = describe_parts(path, config, {key: tuple(value.shape) for key, value in tensors.items()})
    stored = {find_stored_key(path, key): value for key, value in tensors.items()}
    save_file(stored, path, {"format": "pt", **parts})


def _plain_lora(
    path: Path,
    found: Factors,
    layers: Mapping[str, Mapping[str, torch.Tensor]],
    alphas: Mapping[str, float],
    fused: Sequence[str] | None,
    skeleton: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of peft for ΔW = alpha / r · B·A of each layer."""
    tensors, ranks, scales = {}, {}, {}
    biased, dora = (any(leaf in pair for pair in layers.values()) for leaf in ("bias", "magnitude"))
    if dora and (plain := next((name for name, pair in layers.items() if "magnitude" not in pair), None)):
        raise Unsupported(
            f"{path} is a DoRA that lacks the magnitudes of {plain}; peft has DoRA for all layers or none."
        )
    for name, pair in layers.items():
        down, up, scale = pair["A"].float(), pair["B"].float(), float(alphas[name])
        size = _rows(skeleton, name)
        if len(down) != up.shape[1] or (found.form == "loralib" and size == len(PARTS) * len(up)):
            if size is None or found.form != "loralib" or len(down) % up.shape[1]:
                raise DamagedFile(
                    f"{path}: A {tuple(down.shape)} and B {tuple(up.shape)} of {name} cannot be multiplied."
                )
            groups = len(down) // up.shape[1]
            up = _unfuse(path, name, up, groups, fused, size)
            scale *= groups  # peft divides by the rank of all groups together
        ranks[name], scales[name] = len(down), scale
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.contiguous()
        if biased:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = pair.get("bias", up.new_zeros(len(up))).float().contiguous()
        if dora:
            rows = pair["magnitude"].float().flatten()
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = rows if up.ndim == 2 else rows[None, :, None, None]
    usual, scale = max(ranks.values()), max(scales.values())
    return tensors, {
        "r": usual,
        "lora_alpha": int(scale) if scale.is_integer() else scale,
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != usual},
        "alpha_pattern": {re.escape(name): value for name, value in scales.items() if value != scale},
        **({"use_dora": True} if dora else {}),
        **({"lora_bias": True} if biased else {}),
    }


def _rows(skeleton: Any, name: str) -> int | None:
    """Of a layer's weight; None where there is no base to ask, or no linear layer."""
    module = None if skeleton is None else skeleton.get_submodule(name)
    return linear_shape(module)[1] if is_linear(module) and module is not None else None


def _unfuse(
    path: Path, name: str, up: torch.Tensor, groups: int, fused: Sequence[str] | None, size: int
) -> torch.Tensor:
    """B of a layer whose rows are q, k and v: block by block, as each part has its own r columns.

    loralib's MergedLinear stores the enabled parts only, B (k · m, r) for A (k · r, d_in): part g is B_g·A_g. Side by
    side they are one B (size, k · r), with zeros outside the blocks.
    """
    rows, rank = len(up) // groups, up.shape[1]
    if fused is None or len(fused) != groups or not set(fused) <= set(PARTS) or rows * len(PARTS) != size:
        raise BadInput(
            f"{path}: {name} is a fused layer of which {groups} parts of {rows} rows are adapted, and the file does "
            "not say which; give --fused, such as q,v."
        )
    whole = up.new_zeros(size, groups * rank)
    for g, part in enumerate(sorted(fused, key=PARTS.index)):
        at = PARTS.index(part) * rows
        whole[at : at + rows, g * rank : (g + 1) * rank] = up[g * rows : (g + 1) * rows]
    return whole


def base_skeleton(name: str, architecture: str | None = None) -> transformers.PreTrainedModel:
    """The structure of any model of transformers, without weights, by its config's `architectures`.

    Raises:
        InlayError: No such base, or none of transformers' classes.
    """
    config = read_config(name, resolve_base(name), None)
    if is_diffusion(config):
        return load_structure(name, "AutoModel", config)
    if architecture and (inner := getattr(config, "text_config", None)) is not None:
        config = inner
    named = architecture or next(iter(config.architectures or []), "")
    kind = getattr(transformers, str(named), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise Unsupported(f"the config of {name} names the architecture {named!r}, which transformers does not have.")
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # a config is data from anywhere: it fails in any way
        raise explain_load_error(name, error) from error


def _renaming(skeleton: transformers.PreTrainedModel) -> Callable[[str], str]:
    """The name in this version of transformers of a tensor in an older checkpoint of the same model."""
    steps = [step for step in get_model_conversion_mapping(skeleton) if isinstance(step, WeightRenaming)]

    def rename(key: str) -> str:
        for step in steps:
            key, _ = step.rename_source_key(key)
        return key

    return rename


def _check_sites(name: str, skeleton: torch.nn.Module, sites: Sequence[str] | Mapping[str, Any]) -> None:
    modules = {path for path, _ in skeleton.named_modules()}
    if unknown := [site for site in sites if site not in modules]:
        raise WrongBase(
            f"{name} adapts {len(unknown)} layers that {type(skeleton).__name__} does not have ({unknown[0]}); give "
            "another --base."
        )


def _check_shapes(
    name: str, skeleton: torch.nn.Module, tensors: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]
) -> None:
    """Factors as the layers want them; tensors of a head may have another number of classes."""
    for key, value in tensors.items():
        module = skeleton.get_submodule(_site(key).removeprefix(PREFIX))
        if isinstance(module, torch.nn.Conv2d):
            size_in, size_out = tuple(module.weight.shape[1:]), len(module.weight)
        elif is_linear(module):
            size_in, size_out = linear_shape(module)[:1], linear_shape(module)[1]
        else:
            raise WrongBase(
                f"{name} adapts {_site(key)}, which is neither a linear layer nor a convolution of "
                f"{type(skeleton).__name__}."
            )
        if ".lora_A." in key and tuple(value.shape[1:]) != size_in:
            raise WrongBase(
                f"{name} does not fit its base: {key} takes {tuple(value.shape[1:])} features, and the layer {size_in}."
            )
        if ".lora_B." in key and len(value) != size_out:
            raise WrongBase(
                f"{name} does not fit its base: {key} gives {len(value)} features, and the layer {size_out}."
            )
    known = dict(skeleton.named_parameters())
    for key, value in whole.items():
        if key not in known or not key.startswith(_HEADS) or known[key].shape[1:] != value.shape[1:]:
            raise WrongBase(f"{name} holds {key} {tuple(value.shape)}, which is not a tensor of its base's head.")


def _load_on_base(name: str, folder: Path) -> LoadedAdapter | None:
    """The adapter on its base with a head of its size; None where inlay loads no such models.

    None as well for an adapter that brings the embedding of an enlarged base: plain peft's form holds that.
    """
    file = read_adapter(folder)
    try:
        model = load_base(name)
    except InlayError:
        return None
    _, carried = split_base_weights(file, read_weights(file), model)
    if carried and not is_base_with(model, carried):
        load_adapter(folder, name)
        return None
    heads = [shape[0] for key, shape in file.shapes.items() if key.removeprefix(PREFIX).startswith(_HEADS)]
    if heads and heads[-1] != getattr(model.config, "num_labels", None):
        model = load_base(name, labels=[f"LABEL_{i}" for i in range(heads[-1])])
    return load_adapter(folder, model)
