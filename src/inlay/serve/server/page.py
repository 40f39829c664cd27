"""The page at `/`: choose an adapter, give it an image or a text, see the answer. It is one file and loads no other."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from inlay.errors import InlayError
from inlay.serve.server.answers import hide_paths
from inlay.serve.server.service import Service
from inlay.tasks.serving import SingleServing, Writing

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

router = APIRouter()


def _hash_parts(tag: str) -> str:
    """What allows the page's own scripts or styles, and no others."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_parts('script')}; style-src {_hash_parts('style')}; "
        "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def show_page() -> Response:
    """The page, which asks the server for all that it shows."""
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get("/page/about")
async def describe_service(request: Request) -> dict[str, Any]:
    """What the page needs to know: the task, the fields of a request, and the adapters.

    `own_inputs` has the fields of adapters where they are others than those of all.
    """
    service: Service = request.app.state.service
    serving = service.serving
    return {
        "task": service.task.name,
        "action": "complete" if isinstance(serving, Writing) else serving.action,
        "base": service.base_name,
        "inputs": [vars(spec) for spec in serving.inputs],
        "own_inputs": await service.run_on_pool(_list_own_inputs, service),
        "adapters": sorted(service.bank.names),
        "refused": {name: hide_paths(service.hide_base(reason)) for name, reason in service.refused.items()},
    }


def _list_own_inputs(service: Service) -> dict[str, list[dict[str, Any]]]:
    serving, found = service.serving, {}
    for name in service.bank.names if isinstance(serving, SingleServing) else ():
        try:
            _, adapter = service.describe_adapter(name)
        except InlayError:  # said when it is asked
            continue
        inputs = serving.list_inputs(adapter)
        if inputs != serving.inputs:
            found[name] = [vars(spec) for spec in inputs]
    return found
