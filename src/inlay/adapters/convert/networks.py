"""torchvision's SqueezeNet and ShuffleNet v2, as model folders of the same networks here.

    import_network("shufflenetv2_x1-5666bf0f80.pth", "shufflenet")

Widths and version are read off the tensors, so that narrower networks of the same build are taken too. Source of the
names: torchvision/models/squeezenet.py and shufflenetv2.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, PreTrainedConfig

from inlay.adapters.convert.factors import read_tensors
from inlay.bases.load import set_labels, take_first_line
from inlay.bases.networks.configs import (
    IMAGENET_PROCESSOR,
    WIDTHS,
    ShuffleNetV2Config,
    SqueezeNetConfig,
)
from inlay.bases.processors import build_processor
from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.files.atomic import writing
from inlay.files.outputs import check_output_folder

Tensors = Mapping[str, torch.Tensor]
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class ImportedNetwork:
    """What an import made.

    Attributes:
        folder: The model.
        network: Its class.
        parameters: How many it has.
        labels: How many classes it names.
    """

    folder: Path
    network: str
    parameters: int
    labels: int


def holds_network(source: str | Path) -> bool:
    """True for a file whose tensors are named as those of one of torchvision's networks that can be imported.

    Raises:
        InlayError: A file that cannot be read.
    """
    path = Path(source).expanduser()
    return path.is_file() and _find_kind(read_tensors(path)[0]) is not None


def import_network(source: str | Path, out: str | Path, *, labels: Sequence[str] | None = None) -> ImportedNetwork:
    """Convert a state dict of torchvision's SqueezeNet 1.0 or 1.1 or of its ShuffleNet v2, of any width.

    Args:
        source: A .pth or .safetensors file. No code in it runs.
        out: A new folder, for `load_base`: config.json, model.safetensors and preprocessor_config.json with
            torchvision's preprocessing of ImageNet.
        labels: Names of the classes, in their order; default: LABEL_0, LABEL_1 and so on.

    Raises:
        InlayError: Another network, tensors that are missing, too many or of another shape, labels of another number.
    """
    path, out = Path(source).expanduser(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists; give a new folder.")
    check_output_folder(out)
    tensors, _ = read_tensors(path)
    kind = _find_kind(tensors)
    if kind is None:
        some = ", ".join(list(tensors)[:3])
        raise Unsupported(
            f"{path} is neither a SqueezeNet nor a ShuffleNet v2 of torchvision (its keys: {some or 'none'}); give the "
            "state dict of one."
        )
    names = _name_squeezenet(tensors) if kind == "SqueezeNet" else _name_shufflenet(tensors)
    ours = _rename(path, kind, tensors, names)
    try:
        config = _describe_squeezenet(tensors, ours) if kind == "SqueezeNet" else _describe_shufflenet(ours)
        classes = len(ours["classifier.weight"])
    except Exception as error:  # shapes that no layer has, widths that no config takes
        raise DamagedFile(f"the tensors of {path} do not make up a {kind}: {take_first_line(error)}") from error
    if labels is not None and len(labels) != classes:
        raise BadInput(f"{path} has {classes} classes, and {len(labels)} labels are given; give one for each class.")
    set_labels(config, labels if labels is not None else [f"LABEL_{i}" for i in range(classes)])
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    for name, value in model.state_dict().items():
        if value.shape != ours[name].shape:
            found, wanted = tuple(tensors[names[name]].shape), tuple(value.shape)
            raise DamagedFile(f"{names[name]!r} of {path} is {found}, and the rest of its {kind} needs {wanted}.")
    with writing(out) as folder:
        config.architectures, config.dtype = [type(model).__name__], torch.float32
        config.save_pretrained(folder)
        save_file(ours, folder / "model.safetensors", {"format": "pt"})
        build_processor(_choose_preprocessing(config)).save_pretrained(folder)
    return ImportedNetwork(out, type(model).__name__, model.num_parameters(), classes)


def read_labels(path: str | Path) -> list[str]:
    """The names in a text file, one a line; empty lines do not count.

    Raises:
        InlayError: No such file, or one that is no text.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"'{path}' cannot be read ({type(error).__name__}); give a text file, one label a line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _find_kind(tensors: Tensors) -> str | None:
    if any(re.fullmatch(r"features\.\d+\.squeeze\.weight", key) for key in tensors):
        return "SqueezeNet"
    if any(re.fullmatch(r"stage\d\.\d+\.branch2\.\d\.weight", key) for key in tensors):
        return "ShuffleNet v2"
    return None


def _list_fires(tensors: Tensors) -> list[int]:
    """Their numbers in torchvision's `features`."""
    return sorted({int(m[1]) for key in tensors if (m := re.fullmatch(r"features\.(\d+)\.squeeze\.weight", key))})


def _name_squeezenet(tensors: Tensors) -> dict[str, str]:
    """Tensors here, and what torchvision calls them."""
    layers = {"squeezenet.stem.convolution": "features.0", "classifier": "classifier.1"}
    for i, number in enumerate(_list_fires(tensors)):
        for part in ("squeeze", "expand1x1", "expand3x3"):
            layers[f"squeezenet.blocks.{i}.{part}"] = f"features.{number}.{part}"
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in layers.items() for leaf in ("weight", "bias")}


def _name_shufflenet(tensors: Tensors) -> dict[str, str]:
    """Tensors here, and what torchvision calls them: a convolution, and the norm that follows it there."""
    layers = {"stem.convolution": "conv1.0", "tail": "conv5.0"}
    found = {(int(m[1]), int(m[2])) for key in tensors if (m := re.match(r"stage(\d)\.(\d+)\.branch2\.", key))}
    for i, (stage, unit) in enumerate(sorted(found)):
        start = f"stage{stage}.{unit}"
        if unit == 0:
            layers |= {
                f"blocks.{i}.shortcut_3x3": f"{start}.branch1.0",
                f"blocks.{i}.shortcut_1x1": f"{start}.branch1.2",
            }
        for part, number in (("first_1x1", 0), ("conv_3x3", 3), ("last_1x1", 5)):
            layers[f"blocks.{i}.{part}"] = f"{start}.branch2.{number}"
    names = {f"classifier.{leaf}": f"fc.{leaf}" for leaf in ("weight", "bias")}
    for ours, theirs in layers.items():
        sequence, _, place = theirs.rpartition(".")
        names[f"shufflenet.{ours}.convolution.weight"] = f"{theirs}.weight"
        for leaf in _NORM:
            names[f"shufflenet.{ours}.normalization.{leaf}"] = f"{sequence}.{int(place) + 1}.{leaf}"
    return names


def _rename(path: Path, kind: str, tensors: Tensors, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors under their names here, in float32."""
    counters = {key for key in tensors if key.endswith(".num_batches_tracked")}
    missing, odd = sorted(set(names.values()) - set(tensors)), sorted(set(tensors) - set(names.values()) - counters)
    if missing:
        raise DamagedFile(f"{path} lacks {len(missing)} tensors of torchvision's {kind}, {missing[0]!r} first.")
    if odd:
        raise Unsupported(f"{path} has {len(odd)} tensors that torchvision's {kind} lacks, {odd[0]!r} first.")
    if broken := [key for key in names.values() if not tensors[key].isfinite().all()]:
        raise DamagedFile(f"the tensor {broken[0]!r} of {path} holds NaN or Inf; it cannot be used.")
    ours = {name: tensors[key].float().contiguous() for name, key in names.items()}
    ours["classifier.weight"] = ours["classifier.weight"].flatten(1)  # SqueezeNet's is a 1x1 convolution there
    norms = [name for name in names if name.endswith(".running_var")]
    return ours | {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in norms}


def _describe_squeezenet(tensors: Tensors, ours: Tensors) -> PreTrainedConfig:
    """The stem is in front of a pooling; before other fire modules, pooling takes a number of `features`."""
    fires = _list_fires(tensors)
    widths = {
        f"{part}_channels": [len(ours[f"squeezenet.blocks.{i}.{part}.weight"]) for i in range(len(fires))]
        for part in ("squeeze", "expand1x1", "expand3x3")
    }
    stem = ours["squeezenet.stem.convolution.weight"]
    return SqueezeNetConfig(
        stem_channels=len(stem),
        stem_kernel_size=stem.shape[-1],
        pool_before=[i for i, number in enumerate(fires) if number - (1, *fires)[i] == 2],
        **widths,
    )


def _describe_shufflenet(ours: Tensors) -> PreTrainedConfig:
    first = [name for name in ours if re.fullmatch(r"shufflenet\.blocks\.\d+\.first_1x1\.convolution\.weight", name)]
    starts = [i for i in range(len(first)) if f"shufflenet.blocks.{i}.shortcut_1x1.convolution.weight" in ours]
    ends = [*starts[1:], len(first)]
    return ShuffleNetV2Config(
        stem_channels=len(ours["shufflenet.stem.convolution.convolution.weight"]),
        stage_channels=[2 * len(ours[f"shufflenet.blocks.{i}.last_1x1.convolution.weight"]) for i in starts],
        depths=[end - start for start, end in zip(starts, ends, strict=True)],
        branch_channels=[len(ours[name]) for name in first],
        last_channels=len(ours["shufflenet.tail.convolution.weight"]),
    )


def _choose_preprocessing(config: Any) -> dict[str, Any]:
    """That of torchvision's weights: those of ShuffleNet v2 1.5x and 2x were made later, for images of 232 pixels."""
    later = [WIDTHS[width]["stage_channels"] for width in (1.5, 2.0)]
    side = 232 if list(getattr(config, "stage_channels", ())) in later else 256
    return {**IMAGENET_PROCESSOR, "size": {"shortest_edge": side}}
