"""Is the method of an adapter one that this peft computes as it was meant, and that takes no more than its own file?"""

from inlay.adapters.config import is_audited
from inlay.adapters.file import CONFIG, AdapterFile
from inlay.errors import Unsupported
from inlay.methods._peft import find_unknown_settings, knows_method


def check_method(file: AdapterFile) -> None:
    """Raise InlayError for a method that this peft does not know, or inlay not well enough; settings it would drop."""
    for part in (file.config, *(file.config.get("parts") or [])):
        method = part["peft_type"]
        if not knows_method(method):
            raise Unsupported(
                f"adapter {file.name!r} is of the method {method!r}, which neither this inlay nor this peft knows: "
                "upgrade them."
            )
        if not is_audited(method):
            raise Unsupported(
                f"adapter {file.name!r} is of peft's method {method!r}, of which inlay does not know that it takes no "
                "more than its own file; load it with peft if you trust it."
            )
        # what a newer peft has written may be of no effect here: where an output is stored it tells, else nothing does
        if (odd := find_unknown_settings(part)) and not file.record.get("golden"):
            raise Unsupported(
                f"{file.folder / CONFIG} sets {', '.join(odd)}, which this peft does not know in {method} or would "
                "misread; upgrade peft, or download the adapter again."
            )
