"""The verb `inlay serve`: many adapters on one base, over HTTP."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from inlay.cli.show import DeviceOption, DtypeOption
from inlay.errors import Unsupported
from inlay.serve.server.config import ServiceConfig


def serve(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Embedded base, local folder or Hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="A folder of adapters, or adapters: folders and Hub ids.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every network of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    budget_mb: Annotated[
        float | None, typer.Option(help="Memory for adapters in MB; the least recently used ones give way.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    **bounds: Any,
) -> None:
    """Serve many adapters of any method on one base, such as `serve builtin:vit-tiny adapters_hub`."""
    try:
        from inlay.serve.server.run import run_server
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed; pip install 'inlay[serve]' installs it.") from error
    from inlay.serve.bank import Bank
    from inlay.serve.server.service import Service

    config = ServiceConfig(**bounds)
    given = adapters[0] if len(adapters) == 1 else adapters
    bank = Bank(
        base,
        given,
        budget_mb=budget_mb,
        skip_unfit=True,
        device=device,
        dtype=dtype or "float32",
    )
    service = Service(bank, config)
    for name, reason in service.refused.items():
        print(f"not served: {name}: {reason}", file=sys.stderr)
    run_server(service, host=host, port=port)


def _add_options(verb: Callable[..., None], config: type) -> None:
    """Give a verb the fields of a dataclass as options, whose help is written there."""
    own = inspect.signature(verb).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = get_type_hints(config)
    for each in fields(config):
        panel = typer.Option(help=each.metadata["help"], rich_help_panel="Bounds")
        annotation: Any = Annotated[hints[each.name], panel]
        parameters.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=each.default)
        )
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


_add_options(serve, ServiceConfig)

VERBS: dict[str, Callable[..., None]] = {"serve": serve}
