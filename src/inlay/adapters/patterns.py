"""Regular expressions from a config, tried where they can be stopped before they are used where they cannot.

peft matches what an adapter_config.json says of target_modules, exclude_modules, layers_pattern, rank_pattern,
alpha_pattern, modules_to_save and others against the names of a base's modules, with Python's `re`: a backtracking
engine that `(a+)+b` keeps busy for ever, and that nothing stops but the end of its process. No look at an expression
tells the harmful ones apart from those in use (`.*language.*(attn|mlp).*(q|v)_proj.*` has four open ends), so the very
matches that peft will make are made before, by another process, which is killed when it takes too long.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from inlay.errors import Unsupported

SECONDS = 5.0  # for all of them; usual ones take milliseconds, the process to try them 50
MAX_LENGTH = 10_000  # of one
_PLAIN = {"base_model_name_or_path", "revision", "peft_version", "peft_type", "task_type", "auto_mapping"}
# Every form that peft gives a text of a config before it matches a name. One that is no expression is peft's to refuse.
_PROGRAM = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for text in patterns:
    for form in (text, rf"(.*\.)?({text})$", rf"(^|.*\.){text}($|\..*)", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\."):
        try:
            compiled = re.compile(form)
        except Exception:
            continue
        for name in names:
            compiled.match(name), compiled.fullmatch(name), compiled.search(name)
"""


def check_patterns(config: dict[str, Any], names: Iterable[str], adapter: str) -> None:
    """Raise InlayError if a text of the config, taken as a regular expression, is not done with these names in time.

    Free where no text has a repeat, an alternative or a group: then each match takes time linear in the name.

    Args:
        config: Of an adapter.
        names: Of the modules that they will be matched against.
        adapter: For the message.
    """
    patterns = sorted({text for text in _texts(config) if not set("*+?{|(").isdisjoint(text)})
    if not patterns:
        return
    if len(longest := max(patterns, key=len)) > MAX_LENGTH:
        raise Unsupported(
            f"a pattern in the config of adapter {adapter!r} has {len(longest):,} characters, and inlay tries at most "
            f"{MAX_LENGTH:,}; name the modules instead."
        )
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, sorted(set(names))]).encode(),
            timeout=SECONDS,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise Unsupported(
            f"a pattern in the config of adapter {adapter!r} did not finish on this base's {len(set(names)):,} module "
            f"names after {SECONDS:g} s ({patterns[0][:60]!r}{' ...' * (len(patterns) > 1)}); name the modules instead."
        ) from None
    except (subprocess.CalledProcessError, OSError) as error:
        raise Unsupported(f"the patterns in the config of adapter {adapter!r} cannot be tried ({error}).") from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in a config, keys too, but for those that are never matched."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _PLAIN:
                yield key
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
