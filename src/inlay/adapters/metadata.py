"""What the record inside an adapter's file must hold: whoever made the file wrote it, so each type and size is checked.

Its checksum says that a file is as it was saved, not who saved it: anyone can write a record and sign it.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from inlay.adapters.sketch_distance import ENTRY, TOLERANCE
from inlay.errors import DamagedFile
from inlay.tasks import TASKS

MAX_LABELS = 100_000  # a head of so many classes is made before the file's own is compared with it
_FIELDS: dict[str, dict[str, type]] = {
    "record": {"base": dict, "labels": list, "head": list, "preprocessing": dict, "golden": list, "config": str},
    "base": {"name": str, "model_type": str, "precision": str, "sketch": dict},
    "sketch": {"weights": int, "parameters": int, "values": str},
}


def check_record(record: dict[str, Any], where: Path) -> None:
    """Raise InlayError where a record is not what loading takes it for.

    Args:
        record: The JSON, an object.
        where: The file, for the message.
    """
    part: Any = record
    for at, fields in _FIELDS.items():
        part = part if at == "record" else part[at]
        for field, kind in fields.items():
            if type(part.get(field)) is not kind:
                raise DamagedFile(f"the record inside {where} lacks {field}; save the adapter again.")
    base, golden = record["base"], record["golden"]
    optional = {"blocks": int, "width": int, "revision": str}
    wrong = [name for name, kind in optional.items() if not isinstance(base.get(name), kind | None)]
    wrong += [name for name in ("labels", "head") if not all(isinstance(text, str) for text in record[name])]
    wrong += ["golden"] * (not all(type(v) is float or (type(v) is int and abs(v) < 2**53) for v in golden))
    wrong += ["precision"] * (base["precision"] not in TOLERANCE) + ["task"] * (
        record.get("task") not in (None, *TASKS)
    )
    sketch = base["sketch"]
    wrong += ["sketch"] * (not _is_sketch(sketch["values"]) or not _is_rest(sketch.get("rest", "")))
    if len(record["labels"]) > MAX_LABELS:
        raise DamagedFile(f"{where} names {len(record['labels']):,} labels, and inlay reads at most {MAX_LABELS:,}.")
    if wrong:
        raise DamagedFile(f"the record inside {where} has a wrong {wrong[0]}; save the adapter again.")


def _is_sketch(values: str) -> bool:
    """Float32 in base64, two for each weight matrix that was looked at."""
    decoded = _decode(values)
    return decoded is not None and len(decoded) % 8 == 0


def _is_rest(rest: Any) -> bool:
    """Entries in base64, one for each other tensor, each of a known form; older files have none."""
    decoded = _decode(rest)
    if decoded is None or len(decoded) % ENTRY.itemsize:
        return False
    return bool((np.frombuffer(decoded, dtype=ENTRY)["kind"] < len(TOLERANCE)).all())


def _decode(text: Any) -> bytes | None:
    """None for what is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        return None
