"""An extension of griffe: the help of a dataclass field is its docstring in the reference, written once."""

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Reads `field(metadata={"help": ...})` and `option(default, "help")` from the source."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Called by griffe for every attribute that it has visited."""
        text = _help(getattr(node, "value", None))
        if text and not attr.docstring:
            attr.docstring = griffe.Docstring(text, parent=attr)


def _help(call: ast.expr | None) -> str | None:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    found = None
    if call.func.id == "field":
        for keyword in call.keywords:
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                entries = zip(keyword.value.keys, keyword.value.values, strict=True)
                found = next((v for k, v in entries if isinstance(k, ast.Constant) and k.value == "help"), None)
    elif call.func.id == "option":
        named = [keyword.value for keyword in call.keywords if keyword.arg == "help"]
        found = next(iter([*named, *call.args[1:2]]), None)
    return found.value if isinstance(found, ast.Constant) and isinstance(found.value, str) else None
