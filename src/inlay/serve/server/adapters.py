"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters that come and go while the server runs.

Paths, fields, status codes and sentences are those of vLLM's API server, whose clients look for them; an adapter may be
of any method, and one that does not fit gets 409 with the reason. Only folders within allowed roots are loaded.

curl -H 'Content-Type: application/json' -d '{"lora_name": "digits", "lora_path": "digits-v2"}' \\
    http://127.0.0.1:8000/v1/load_lora_adapter
"""

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from inlay.adapters.hub.repository import download
from inlay.errors import BadInput
from inlay.serve.server.answers import parse_object
from inlay.serve.server.refusals import NotAllowed, UnknownAdapter
from inlay.serve.server.service import Service
from inlay.serve.server.trace import current_trace

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
router = APIRouter()
_NAME = re.compile(r"[^\s/][^/]{0,127}")


@dataclass(frozen=True)
class LoadingRules:
    """What clients may load.

    Attributes:
        roots: Folders; what is in one of them may be loaded.
        allow_hub: Adapters on the Hub may be loaded too.
    """

    roots: Sequence[Path]
    allow_hub: bool = False

    @classmethod
    def from_options(cls, roots: Sequence[str], allow_hub: bool) -> "LoadingRules | None":
        """Those of the command line; None where nothing may be loaded.

        Raises:
            BadInput: A root is no folder.
        """
        for root in roots:
            if not Path(root).expanduser().is_dir():
                raise BadInput(f"{root} is not a folder; --allow-loading takes a folder that holds adapters.")
        resolved = [Path(root).expanduser().resolve() for root in roots]
        return cls(resolved, allow_hub) if resolved or allow_hub else None

    def find_folder(self, path: str) -> Path | str:
        """The real folder of a path that is absolute, or relative to a root; a Hub id as it is.

        Raises:
            NotAllowed: It is outside of the roots, by its name or through a link, whether or not it exists.
            UnknownAdapter: There is no such folder in a root.
        """
        if "\0" in path or not path.isprintable():
            raise NotAllowed("lora_path is not a path.")
        inside = [found for root in self.roots if (found := _resolve_within(root, path)) is not None]
        if existing := next((found for found in inside if _is_folder(found)), None):
            return existing
        if self.allow_hub and _HUB_ID.fullmatch(path) and ".." not in path:
            return path
        if inside:
            raise UnknownAdapter(f"No adapter found for {path}")
        raise NotAllowed("lora_path is not in a folder from which this server loads adapters.")


def _resolve_within(root: Path, path: str) -> Path | None:
    """The real path, if it is in this root."""
    found = Path(os.path.realpath(root / path))
    return found if found.is_relative_to(root) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


@router.post("/v1/load_lora_adapter")
async def load_adapter(request: Request) -> Response:
    """Check an adapter and serve it under a name."""
    service: Service = request.app.state.service
    rules: LoadingRules = request.app.state.loading
    given = await _read_object(request)
    name, path = given.get("lora_name"), given.get("lora_path")
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        raise BadInput("Both 'lora_name' and 'lora_path' must be provided.")
    if not _NAME.fullmatch(name) or not name.isprintable():
        raise BadInput("lora_name must have 1 to 128 printable characters, without a slash.")
    current_trace().name_adapter(name, is_known=name in service.bank.names)
    await asyncio.to_thread(_load, service, rules, name, path, given.get("load_inplace") is True)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(request: Request) -> Response:
    """Serve an adapter no longer."""
    service: Service = request.app.state.service
    name = (await _read_object(request)).get("lora_name")
    if not isinstance(name, str) or not name:
        raise BadInput("'lora_name' needs to be provided to unload a LoRA adapter.")
    if name not in service.bank.names:
        raise UnknownAdapter(f"The lora adapter '{name[:128]}' cannot be found.")
    current_trace().name_adapter(name, is_known=False)  # its series end here
    await asyncio.to_thread(service.remove_adapter, name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _load(service: Service, rules: LoadingRules, name: str, path: str, in_place: bool) -> None:
    found = rules.find_folder(path)
    if isinstance(found, str):
        found = _download(found)
    if not service.add_adapter(found, name, replace=in_place):
        raise BadInput(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )


def _download(hub_id: str) -> Path:
    """The adapter in the Hub's cache; a folder of that name in the working directory is not looked at."""
    user, name, *inside = hub_id.split("/")
    return download(f"{user}/{name}", None, *inside)


async def _read_object(request: Request) -> dict[str, Any]:
    """The JSON of a body. Its type must say so: a page of another site can send others without being asked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadInput("the body must be JSON, with Content-Type: application/json.")
    return parse_object(await request.body(), "the body is not JSON.")
