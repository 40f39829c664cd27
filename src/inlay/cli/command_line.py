"""A command line made from dataclasses with argparse: every field is an option. This module imports nothing slow."""

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

# Option names of transformers' Trainer and of peft's examples, and their names here.
_NAMES_ELSEWHERE = {
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "max_steps": "--steps",
    "max_train_steps": "--steps",
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
    "streaming": "--stream",
    "buffer_size": "--shuffle_buffer",
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
    """Copies of the dataclasses `defaults`, with the values from the command line.

    Args:
        defaults: Dataclass instances, whose values are the defaults of the options.
        arguments: The options; the path of a YAML or JSON file that sets them may stand first, and options behind it
            replace those of the file.

    Raises:
        BadInput: An option is unknown, a value has the wrong type or is out of its bounds, or the settings file is
            missing or malformed.
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
        for name, hint in _option_types(default).items():
            _add_option(group, name, hint, values[name], _help_text(default, name))
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        arguments = [*_read_settings_file(Path(arguments[0]), values), *arguments[1:]]
    found, unknown = parser.parse_known_args(_join_negative_numbers(arguments))
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), "")
        if not name:
            raise BadInput(
                f"{unknown[0]!r} is not an option; options look like --{next(iter(values))}. --help lists them."
            )
        raise BadInput(f"there is no option {name}. {_suggest_option(name, values)}")
    settings = [
        type(default)(**{name: getattr(found, name) for name in _option_types(default)}) for default in defaults
    ]
    for each in settings:
        check_options(each)
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}.")  # argparse itself would also print all options


def _option_types(default: Any) -> dict[str, Any]:
    """Types of the options of a dataclass, by name."""
    hints = get_type_hints(type(default))
    return {each.name: hints[each.name] for each in fields(default) if each.init}


def _help_text(default: Any, name: str) -> str:
    text = next(each.metadata.get("help", "") for each in fields(default) if each.name == name)
    return text.replace("%", "%%") or " "  # argparse shows the default only after a help text


def _add_option(group: Any, name: str, hint: Any, default: Any, help: str) -> None:
    """Add one option, whose name may be written with underscores or hyphens."""
    kind, _ = plain_type(hint)
    names = list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
    shown = {"default": default, "help": help}
    if kind is bool:
        group.add_argument(*names, type=_parse_boolean, nargs="?", const=True, **shown)
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


def _parse_boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "off", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")


def _join_negative_numbers(arguments: Sequence[str]) -> list[str]:
    """Write `--rate -1e-3` as `--rate=-1e-3`: argparse takes a negative number with an exponent for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and re.fullmatch(r"-(\d+\.?\d*e[+-]?\d+|inf|nan)", argument, re.IGNORECASE):
            last = joined[-1]
            if last.startswith("--") and "=" not in last:
                joined[-1] = f"{last}={argument}"
                continue
        joined.append(argument)
    return joined


def _suggest_option(option: str, values: Iterable[str]) -> str:
    """A sentence on what the user of an unknown option may have meant."""
    name, known = option.split("=")[0].lstrip("-").replace("-", "_"), set(values)
    here = _NAMES_ELSEWHERE.get(name)
    if here is not None and re.findall(r"\w+", here)[0] in known:
        return f"Here it is {here}."
    completions = [option for option in sorted(known) if name and option.startswith(name)]
    similar = get_close_matches(name, sorted(known), 1) or completions
    return f"Did you mean --{similar[0]}?" if similar else "--help lists all."


def _read_settings_file(file: Path, values: dict[str, Any]) -> list[str]:
    """A YAML or JSON settings file as a command line, so that its values are checked in the same way."""
    import yaml  # type: ignore[import-untyped]

    if not file.is_file():
        raise BadInput(f"there is no settings file {file}.")
    try:
        text = file.read_text(encoding="utf-8")
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        raise BadInput(f"{file} is not valid {file.suffix[1:].upper()}: {got}.") from error
    if not isinstance(settings, dict):
        raise BadInput(
            f"{file} must map option names to values, but holds a {type(settings).__name__}; write name: value."
        )
    unknown = [str(key) for key in settings if key not in values]
    if unknown:
        raise BadInput(f"{file} sets {unknown[0]}, but there is no such option. {_suggest_option(unknown[0], values)}")
    found: list[str] = []
    for key, value in settings.items():
        if value == values[key] and type(value) is type(values[key]):
            continue
        if value is None or isinstance(value, dict) or value == []:
            raise BadInput(f"{file} sets {key} to {value!r}, which is not a value; set one, or leave {key} out.")
        found += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return found


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]
