"""Dataclasses as a command line, by argparse: every field is an option. No import here is slow."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from inlay.errors import BadInput
from inlay.options import check_options, plain_type

# What a user of transformers' Trainer or of peft's examples types first, and what it is called here.
_ELSEWHERE = {
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "max_steps": "--epochs, which may be a fraction",
    "max_train_steps": "--epochs, which may be a fraction",
    "per_device_train_batch_size": "--batch_size, of all processes together",
    "train_batch_size": "--batch_size, of all processes together",
    "per_device_eval_batch_size": "--batch_size, for evaluation too",
    "eval_batch_size": "--batch_size, for evaluation too",
    "gradient_accumulation_steps": "--accumulate: the pieces in which the --batch_size of a step is computed",
    "lr": "--learning_rate",
    "lr_scheduler_type": "--schedule",
    "scheduler": "--schedule",
    "warmup_ratio": "--warmup",
    "warmup_steps": "--warmup, a share of the steps",
    "num_warmup_steps": "--warmup, a share of the steps",
    "max_grad_norm": "--clip_norm",
    "optim": "--optimizer",
    "fp16": "--precision fp16",
    "bf16": "--precision bf16",
    "mixed_precision": "--precision",
    "torch_dtype": "--precision",
    "eval_steps": "--eval_every",
    "save_steps": "--save_every",
    "checkpointing_steps": "--save_every",
    "early_stopping_patience": "--patience",
    "dataloader_num_workers": "--workers",
    "num_workers": "--workers",
    "report_to": "--tracker",
    "overwrite_output_dir": "--overwrite",
    "push_to_hub": "--push_to user/name",
    "hub_model_id": "--push_to",
    "hub_private_repo": "--private",
    "model_name_or_path": "--model",
    "model_name": "--model",
    "base_model": "--model",
    "pretrained_model_name_or_path": "--model",
    "dataset_name": "--dataset",
    "train_file": "--dataset",
    "train_dir": "--dataset",
    "data_path": "--dataset",
    "load_in_8bit": "--quantize 8bit",
    "load_in_4bit": "--quantize 4bit",
    "label_smoothing_factor": "--label_smoothing",
    "block_size": "--max_length",
    "max_seq_length": "--max_length",
    "model_max_length": "--max_length",
    "max_source_length": "--max_length",
    "num_beams": "--beams",
    "no_repeat_ngram_size": "--no_repeat_ngram",
    "per_device_generate_batch_size": "--decode_batch",
    "lora_r": "--rank",
    "lora_rank": "--rank",
    "r": "--rank",
    "lora_alpha": "--alpha",
    "lora_dropout": "--dropout",
    "lora_target_modules": "--sites",
    "target_modules": "--sites",
    "num_virtual_tokens": "--length",
    "prompt_length": "--length",
    "prefix_length": "--length",
    "bottleneck_size": "--width",
    "adapter_size": "--width",
}


def parse(defaults: Sequence[Any], arguments: Sequence[str]) -> list[Any]:
    """Copies of the dataclasses `defaults` as a command line sets them, or the YAML or JSON file that is all of it.

    Raises:
        BadInput: An unknown option, a value of another kind or out of its bounds, a settings file that is none.
    """
    values = {key: value for default in defaults for key, value in asdict(default).items()}
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        description=_first_line(sys.modules["__main__"].__doc__),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for default in defaults:
        group = parser.add_argument_group(_first_line(type(default).__doc__).rstrip("."))
        for name, hint in _hints(default).items():
            _add(group, name, hint, values[name], _help(default, name))
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml", ".json")):
        arguments = _from_file(Path(arguments[0]), values)
    found, unknown = parser.parse_known_args(_joined(arguments))
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), "")
        if not name:
            raise BadInput(f"expected options such as --{next(iter(values))}, got {unknown[0]!r}.")
        raise BadInput(f"there is no option {name}. {_meant(name, values)}")
    settings = [type(default)(**{name: getattr(found, name) for name in _hints(default)}) for default in defaults]
    for each in settings:
        check_options(each)
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}.")  # argparse would print all options with it


def _hints(default: Any) -> dict[str, Any]:
    """Types of the fields that are options, by name."""
    hints = get_type_hints(type(default))
    return {each.name: hints[each.name] for each in fields(default) if each.init}


def _help(default: Any, name: str) -> str:
    text = next(each.metadata.get("help", "") for each in fields(default) if each.name == name)
    return text.replace("%", "%%") or " "  # argparse shows a default behind a help only


def _add(group: Any, name: str, hint: Any, default: Any, help: str) -> None:
    """One option, by its name with underscores or hyphens."""
    kind, _ = plain_type(hint)
    names = list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
    shown = {"default": default, "help": help}
    if kind is bool:
        group.add_argument(*names, type=_boolean, nargs="?", const=True, **shown)
        if default is True:
            opposite = list(dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}")))
            group.add_argument(*opposite, dest=name, action="store_false", help=help)
    elif get_origin(kind) is Literal:
        group.add_argument(*names, choices=get_args(kind), **shown)
    elif get_origin(kind) is list:
        (item,) = get_args(kind)
        accepted = {"choices": get_args(item)} if get_origin(item) is Literal else {"type": item}
        group.add_argument(*names, nargs="+", **accepted, **shown)
    else:
        group.add_argument(*names, type=kind, **shown)


def _boolean(text: str) -> bool:
    known = dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True) | dict.fromkeys(
        ("false", "no", "off", "f", "n", "0"), False
    )
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return known[text.lower()]


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--rate -1e-3` as `--rate=-1e-3`: argparse takes a negative number with an exponent for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.fullmatch(r"-(\d+\.?\d*e[+-]?\d+|inf|nan)", argument, re.IGNORECASE):
            last = joined[-1]
            if last.startswith("--") and "=" not in last:
                joined[-1] = f"{last}={argument}"
                continue
        joined.append(argument)
    return joined


def _meant(option: str, values: Iterable[str]) -> str:
    """What an unknown option may have been meant to be."""
    name, known = option.split("=")[0].lstrip("-").replace("-", "_"), set(values)
    here = _ELSEWHERE.get(name)
    if here is not None and re.findall(r"\w+", here)[0] in known:
        return f"Here it is {here}."
    begun = [option for option in sorted(known) if name and option.startswith(name)]
    near = get_close_matches(name, sorted(known), 1) or begun
    return f"Did you mean --{near[0]}?" if near else "--help lists all."


def _from_file(file: Path, values: dict[str, Any]) -> list[str]:
    """The command line that a YAML or JSON file of settings stands for, so that its values are checked alike."""
    import yaml  # type: ignore[import-untyped]

    if not file.is_file():
        raise BadInput(f"there is no settings file {file}.")
    try:
        text = file.read_text(encoding="utf-8")
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        raise BadInput(f"expected {file.suffix[1:].upper()} in {file}, but got: {got}. Mend it.") from error
    if not isinstance(settings, dict):
        raise BadInput(f"expected names with values in {file}, but got {type(settings).__name__}. Write name: value.")
    unknown = [str(key) for key in settings if key not in values]
    if unknown:
        raise BadInput(f"{file} sets {unknown[0]}, but there is no such option. {_meant(unknown[0], values)}")
    found: list[str] = []
    for key, value in settings.items():
        if value == values[key] and type(value) is type(values[key]):
            continue
        if value is None or isinstance(value, dict) or value == []:
            raise BadInput(f"expected a value for {key} in {file}, but got {value!r}. Give one, or leave it out.")
        found += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return found


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]
