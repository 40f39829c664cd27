"""What 3D Slicer's module "MONAI Label" asks a server for scans: `/info/`, `/infer`, `/session/`, `/datastore/`.

Each adapter is listed three times: under its name as a segmentation, with CLICKS behind it for clicks, and with
SCRIBBLES for what people paint, which comes as a label map. A program sends a scan with its request, or once
(`/session/`, `/datastore/`) and then asks about it; such scans are held in memory for a while. Nothing is trained, and
no labels are kept. Where the server wants a key, `/auth/` says so, and the key is the password.

Source: MONAI Label 0.8.5, monailabel/endpoints and plugins/slicer; https://github.com/Project-MONAI/MONAILabel.
"""

import json
import secrets
from importlib.metadata import version as find_version
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from inlay.errors import BadInput
from inlay.serve.server.answers import check_json_size, name_signature, run_unless_gone
from inlay.serve.server.classify import read_form
from inlay.serve.server.gate import is_key
from inlay.serve.server.refusals import NotAllowed, Replaced
from inlay.serve.server.service import Answered, Service
from inlay.serve.server.uploads import LIFETIME_S, Uploads
from inlay.tasks.serving import Annotating

router = APIRouter()
CLICKS, SCRIBBLES = "_clicks", "_scribbles"
OUTPUTS = ("all", "image", "json")
LONGEST_NAME = 256  # characters of a scan's or a client's


@router.get("/info/")
async def describe_models(request: Request) -> dict[str, Any]:
    """All adapters with their classes."""
    service = _service_of(request)
    models: dict[str, Any] = await service.run_on_pool(_describe_models, service)
    labels = dict.fromkeys(name for model in models.values() for name in model["labels"] if name != "background")
    return {
        "name": "inlay",
        "description": f"Adapters on {service.base_name}",
        "version": find_version("inlay"),
        "labels": [*labels, "background"],
        "models": models,
        "trainers": {},
        "strategies": {},
        "scoring": {},
        "train_stats": {},
        "datastore": {"total": 0, "completed": 0},
    }


@router.post("/infer/{model}")
async def infer(request: Request, model: str, image: str = "", session_id: str = "", output: str = "all") -> Response:
    """The mask that an adapter finds in a scan, as a file, and what is said of it."""
    service = _service_of(request)
    if output not in OUTPUTS:
        raise BadInput(f"unknown output {output[:40]!r}; choose one of {', '.join(OUTPUTS)}.")
    name = _find_name(service, model)
    file, adapter = await service.run_on_pool(service.describe_adapter, name)
    form = await read_form(request)
    label = form.get("label") or None
    if label is not None and not isinstance(label, bytes):
        raise BadInput("label must be one file: a label map of the scan.")
    params = _read_params(form)
    uploads, sent = _uploads_of(request), form.get("file")
    if session_id:
        scan = uploads.get(session_id, "session of that id")
    elif isinstance(sent, bytes):
        scan = sent
    elif image:
        scan = uploads.get(_name_image(request, image, params), "scan of that name from this client")
    else:
        raise BadInput("a request has a scan: as a file, or the image or session_id of one that was sent before.")
    annotating = _annotating_of(service)
    values = annotating.read(scan, params, adapter, label)
    answered = await run_unless_gone(request, service.ask(name, values, tensors=annotating.outputs))
    if answered.signature.digest != file.digest:
        raise Replaced(f"adapter {name!r} was replaced; ask again.")
    return _make_answer(annotating, answered, output, values["suffix"])


@router.put("/session/")
async def create_session(request: Request) -> dict[str, Any]:
    """Hold a scan, for as long as it is asked about."""
    key = secrets.token_hex(16)
    scan = await _read_scan(request, await read_form(request), "files")
    _uploads_of(request).put(key, scan)
    return {"session_id": key, "session_info": _describe_session(key, scan)}


@router.get("/session/{session_id}")
async def describe_session(request: Request, session_id: str) -> dict[str, Any]:
    """That a session is there."""
    return _describe_session(session_id, _uploads_of(request).get(session_id, "session of that id"))


@router.delete("/session/{session_id}")
async def remove_session(request: Request, session_id: str) -> dict[str, Any]:
    """Hold its scan no longer."""
    scan = _uploads_of(request).get(session_id, "session of that id")
    _uploads_of(request).remove(session_id, "session of that id")
    return _describe_session(session_id, scan)


@router.get("/datastore/")
async def list_scans(output: str = "stats") -> dict[str, Any]:
    """Nothing: scans that clients have sent are nobody else's."""
    return {"objects": {}} if output == "all" else {"total": 0, "completed": 0}


@router.put("/datastore/")
@router.put("/datastore/image")
async def upload_scan(request: Request, image: str = "") -> dict[str, Any]:
    """Hold a scan under a name, for this client."""
    form = await read_form(request)
    scan = await _read_scan(request, form, "file")
    image = image or secrets.token_hex(16)
    _uploads_of(request).put(_name_image(request, image, _read_params(form)), scan)
    return {"image": image}


@router.put("/datastore/label")
async def refuse_label() -> Response:
    """Labels stay where they are made."""
    raise NotAllowed("this server keeps no labels; save the segmentation on your own machine.")


@router.get("/auth/")
async def tell_login(request: Request) -> dict[str, bool]:
    """Whether requests need a key."""
    return {"enabled": bool(request.app.state.keys)}


@router.post("/auth/token")
async def log_in(request: Request) -> Response:
    """The key, if the password is one."""
    given = (await read_form(request)).get("password")
    if not isinstance(given, str) or not is_key(given.encode(errors="replace"), request.app.state.keys):
        raise NotAllowed("the password must be an API key of this server.")
    return JSONResponse({"access_token": given, "token_type": "Bearer"}, headers={"Cache-Control": "no-store"})


@router.get("/auth/token/valid")
async def confirm_login() -> dict[str, bool]:
    """That the key of the request is right: the gate has let it in."""
    return {"valid": True}


def _describe_models(service: Service) -> dict[str, Any]:
    models: dict[str, Any] = {}
    names = sorted(service.bank.names)
    for name in names:
        file, adapter = service.describe_adapter(name)
        model = _annotating_of(service).describe(adapter)
        facts = {
            "labels": {**model.classes, "background": 0},
            "dimension": 3,
            "config": dict(model.options),
            **name_signature(service.sign(name, file)),
        }
        models[name] = {**facts, "type": "segmentation", "description": "All classes in the whole scan."}
        for behind, kind, description in (
            (CLICKS, "deepedit", "The same, led by clicks."),
            (SCRIBBLES, "scribbles", "The same, corrected where scribbles are painted."),
        ):
            if name + behind not in names:
                models[name + behind] = {**facts, "type": kind, "description": description}
    return models


def _find_name(service: Service, model: str) -> str:
    """The adapter that stands behind a name of `/info/`, in which the client has written blanks as plus signs."""
    for name in (model, model.replace("+", " ")):
        for known in (name, name.removesuffix(CLICKS), name.removesuffix(SCRIBBLES)):
            if known in service.bank.names or known in service.refused:
                return known
    return model


def _read_params(form: dict[str, Any]) -> dict[str, Any]:
    given = form.get("params") or "{}"
    try:
        check_json_size(given if isinstance(given, bytes) else str(given).encode(errors="replace"))
        params = json.loads(given)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput("params must be a JSON object.") from error
    if not isinstance(params, dict):
        raise BadInput(f"params must be a JSON object, got {type(params).__name__}.")
    return params


async def _read_scan(request: Request, form: dict[str, Any], field: str) -> bytes:
    service, scan = _service_of(request), form.get(field)
    if isinstance(scan, list):
        raise BadInput(f"{len(scan)} files were sent; send one scan as one file.")
    if not isinstance(scan, bytes):
        raise BadInput(f"the form has no file {field}.")
    await service.run_on_pool(_annotating_of(service).check, scan, service.config.limits)
    return scan


def _name_image(request: Request, image: str, params: dict[str, Any]) -> tuple[str, str, str]:
    """A scan is known under its name to the client that sent it: two people's "MRHead" are two scans."""
    host = request.client.host if request.client else ""
    return host, str(params.get("client_id"))[:LONGEST_NAME], image[:LONGEST_NAME]


def _describe_session(key: str, scan: bytes) -> dict[str, Any]:
    return {"name": key, "size": len(scan), "expiry": int(LIFETIME_S)}


def _make_answer(annotating: Annotating, answered: Answered, output: str, suffix: str) -> Response:
    mask, facts = annotating.reply(answered.reply.tensors)
    signature = name_signature(answered.signature)
    headers = {f"X-Inlay-{key.replace('_', '-')}": quote(value, safe=":/ ") for key, value in signature.items()}
    said = {**signature, **facts}
    if output == "json":
        return JSONResponse(said, headers=headers)
    file = f"{secrets.token_hex(8)}{suffix}"
    media = "application/gzip" if suffix == ".nii.gz" else "application/octet-stream"
    if output == "image":
        headers["Content-Disposition"] = f'attachment; filename="{file}"'
        return Response(mask, media_type=media, headers=headers)
    edge = secrets.token_hex(16)
    parts = (
        f'--{edge}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n'
        f'{json.dumps(said)}\r\n--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{file}"\r\n'
        f"Content-Type: {media}\r\n\r\n"
    )
    body = parts.encode() + mask + f"\r\n--{edge}--\r\n".encode()
    return Response(body, media_type=f"multipart/form-data; boundary={edge}", headers=headers)


def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _uploads_of(request: Request) -> Uploads:
    uploads: Uploads = request.app.state.uploads
    return uploads


def _annotating_of(service: Service) -> Annotating:
    annotating = service.serving.annotating
    assert annotating is not None  # the routes are there only where it is
    return annotating
