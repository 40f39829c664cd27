"""An extension of griffe: the help of dataclass fields is their entry in the reference, so that it is written once."""

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Adds fields of `field(metadata={"help": ...})` and `option(default, "help")` to their class's docstring."""

    def __init__(self) -> None:
        self._help: dict[str, list[str]] = {}  # lines by the path of the class

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Griffe calls this for every attribute that it has visited."""
        text = _help(getattr(node, "value", None))
        if text and attr.parent:
            self._help.setdefault(attr.parent.path, []).append(f"    {attr.name}: {text}")
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "option":
            attr.value = attr.value.arguments[0]  # the default, for the signature

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Griffe calls this for every class after its members."""
        lines = self._help.get(cls.path)
        if lines and cls.docstring and "Attributes:" not in cls.docstring.value:
            cls.docstring.value = "\n".join([cls.docstring.value.rstrip(), "", "Attributes:", *lines])


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
