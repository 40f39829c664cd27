"""What an adapter_config.json may ask for: it is data from anywhere, and peft does as it says.

Known without peft, so that `read_adapter` can look before anything is imported: methods that read other files or change
the base, settings that do, numbers that are none. What peft itself must be asked is in
`inlay.methods._peft.odd_settings`.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inlay.errors import DamagedFile, Unsupported
from inlay.files.bounded_json import is_text
from inlay.peft_types import base_changing_init

MAX_SCALE = 1e6  # of alpha and such; the largest in use are below 1e3
# peft's methods (0.21.2) in whose code no file is read, no module imported and nothing downloaded that a config names,
# and whose injection leaves the base's weights (tested).
AUDITED = frozenset(
    """
    ADALORA BOFT C3A FOURIERFT HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT PREFIX_TUNING PROMPT_TUNING P_TUNING RANDLORA
    ROAD TRAINABLE_TOKENS VBLORA VERA
    """.split()  # noqa: SIM905
)
_REFUSED = {
    "MULTITASK_PROMPT_TUNING": "reads a file that its config names",
    "OSF": "changes the base at each load",
    "SHADOW": "loads a second model that its config names",
    "XLORA": "loads other adapters that its config names",
}
# Settings that make peft import a module, build another base, or expect more adapters than this one.
_EMPTY = {
    "arrow_config": "routes between other adapters",
    "layer_replication": "builds a base with more blocks",
    "megatron_config": "makes peft import a module that the config names",
    "prompt_tuning_init_state_dict_path": "makes peft read a file that the config names",
}
_INITS = frozenset([True, False, None, "eva", "gaussian", "mica", "orthogonal"])  # these leave it
_RANKS = ("r", "rank", "num_vectors", "num_virtual_tokens", "encoder_hidden_size", "n_frequency")
_WIDTHS = ("width", "length", "r")  # the same of inlay's methods
_META = ("LORA", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING")  # compared with the file before memory is taken


def check_config(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raise InlayError if an adapter's config asks for what its own tensors cannot give, or for harm.

    Args:
        config: The JSON, whose `peft_type` is a text; parts of a composite are looked at, too.
        shapes: Of the tensors that were saved with it.
        where: The file, for the message.
    """
    for path, value in _leaves(config):
        if not is_text(path) or (isinstance(value, str) and not is_text(value)):
            raise DamagedFile(f"{where} holds half a character (an unpaired surrogate); download it again.")
        if isinstance(value, float) and not math.isfinite(value):
            raise DamagedFile(f"{where} says {path} = {value}, which is not a number; download it again.")
        if path.endswith("trust_remote_code") and value:
            raise Unsupported(f"{where} asks for code from a repository (trust_remote_code), which inlay never runs.")
    parts = config.get("parts") or []
    typed = isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("peft_type"), str) for p in parts)
    if not typed or not _names(config.get("modules_to_save"), list):
        raise DamagedFile(f"{where} has parts or modules_to_save of a wrong kind; download it again.")
    for part in [config, *parts]:
        _check_method(part["peft_type"], where)
        _check_settings(part, where)
        _check_sizes(part, shapes, where)


def _check_method(method: str, where: Path) -> None:
    """Methods that peft does not know are left to `check_method`, which can ask it."""
    if method in _REFUSED:
        raise Unsupported(f"{where} is of the method {method}, which {_REFUSED[method]}: inlay does not load it.")


def is_audited(method: str) -> bool:
    """True for a method of inlay, and for one of peft's that is known to take no more than its own file."""
    return method in AUDITED or method.startswith("INLAY_")


def _check_settings(config: dict[str, Any], where: Path) -> None:
    for name in ("target_modules", "exclude_modules"):
        if not _names(config.get(name), list, str):
            raise DamagedFile(
                f"{where} does not fit this base: {name} must be a text or a list of texts; download it again."
            )
    for name, harm in _EMPTY.items():
        if config.get(name):
            raise Unsupported(f"{where} sets {name}, which {harm}: inlay does not load such an adapter.")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or (init not in _INITS and not find_base_changing_init(config)):
        raise Unsupported(f"{where} names the unknown initialisation {init!r}; set init_lora_weights to true.")


def _names(value: Any, *kinds: type) -> bool:
    """True for nothing, and for one of these kinds; a list is of texts."""
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or (listed if isinstance(value, list) else isinstance(value, kinds))


def refuse_biases(config: dict[str, Any], adapter: str) -> None:
    """Raise InlayError for an adapter that writes over biases of the base, where that base serves for more than it."""
    if (bias := config.get("bias", "none")) not in ("none", None, False):
        raise Unsupported(
            f"adapter {adapter!r} was trained with bias={bias!r}: its file replaces biases of the base itself, for "
            "every use of that base; load it by itself (load_adapter without a model of yours as base), or train with "
            "lora_bias=True."
        )


def find_base_changing_init(config: dict[str, Any]) -> str | None:
    """The initialisation of a config, or of one of its parts, if it is one that changes the base's weights."""
    inits = [base_changing_init(part) for part in (config, *(config.get("parts") or []))]
    return next((init for init in inits if init is not None), None)


def _check_sizes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Scales that no training gives; widths for which peft takes memory before the file's shapes are compared."""
    for path, value in _leaves(config):
        name = path.rpartition(".")[2] if "_pattern." not in path else path.partition("_pattern.")[0]
        scales = "alpha" in name or name in ("scale", "scaling")
        if scales and type(value) in (int, float) and abs(value) > MAX_SCALE:
            raise DamagedFile(
                f"{where} says {path} = {value:g}; expected at most {MAX_SCALE:g} in size. Download it again."
            )
    if config["peft_type"] in _META:
        return
    largest = max((axis for shape in shapes.values() for axis in shape), default=0)
    for name in _WIDTHS if config["peft_type"].startswith("INLAY_") else _RANKS:
        value = config.get(name)
        if type(value) is int and value > max(largest, 1024):
            raise DamagedFile(
                f"{where} says {name} = {value}, but no tensor of its file has more than {largest} rows or columns; "
                "download the adapter again."
            )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a JSON object that is no container, with the names on the way to it."""
    stack = [(path, value)]
    while stack:
        at, item = stack.pop()
        if isinstance(item, dict):
            stack += [(f"{at}.{key}" if at else key, inner) for key, inner in item.items()]
        elif isinstance(item, list):
            stack += [(at, inner) for inner in item]
        else:
            yield at, item
