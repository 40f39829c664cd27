"""The `inlay` command. Each verb parses its options, calls one function of the library and prints the result.

A verb imports the library only when it runs, so that `inlay --help` is fast.
"""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from inlay.cli import combine, compress, hub, measure, paint, prune, report, serve, study, trust, volumes
from inlay.cli.evaluate import evaluate
from inlay.cli.predict import predict
from inlay.cli.show import AdapterArgument, BaseOption, DeviceOption, JsonOption, printable, show
from inlay.errors import InlayError

app = typer.Typer(
    name="inlay",
    help="Inspect, use, combine and share adapters for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def info(
    adapter: AdapterArgument,
    base: BaseOption = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Run every check; exit status 1 if one of them fails.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe an adapter. With --base, also load it on that base to check that it fits."""
    if check:
        trust.show_checks(adapter, base, device, as_json)
        return
    from inlay.adapters.hub.fetch import fetch
    from inlay.adapters.study import describe_study
    from inlay.adapters.summary import summarise_adapter

    facts = summarise_adapter(fetch(adapter))
    if base is not None:
        from inlay.adapters.load import load_adapter

        loaded = load_adapter(adapter, base, device=device)
        golden = "not stored" if loaded.deviation is None else f"deviation {loaded.deviation:.1e}"
        facts["fits"] = (
            f"{base}: yes, golden output {golden}" if loaded.verified else f"{base}: it loads, but is unverified"
        )
    if not as_json:
        facts["study"] = " ".join(describe_study(facts["study"]))
    show(facts, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Embedded base, local folder or Hub id.")],
    method: Annotated[str, typer.Option(help="Name of a method in inlay.METHODS.")] = "lora",
    width: Annotated[int, typer.Option(help="Rank or other width of the adapter.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per text.")] = 128,
    labels: Annotated[
        int | None,
        typer.Option(help="Classes of a classifier, default 10; or of scans without the background, default 1."),
    ] = None,
    crop: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="D H W", help="Voxels of a scan that the model sees at a time; default: 32 40 40."),
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of a scan; default: 1.")] = None,
    spacing_mm: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            metavar="D H W", help="Spacing of a scan in mm: where slices are thick, a token has fewer of them."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.")] = "float32",
    quantize: Annotated[str | None, typer.Option(help="Hold the frozen base in 8bit or 4bit.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, paged_adamw or paged_adamw8bit.")] = "adamw",
    precision: Annotated[str, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    accumulate: Annotated[int, typer.Option(help="Pieces into which a step is divided.")] = 1,
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the trained weights, which is a copy of them.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: the best that this machine has.")] = None,
    take_steps: Annotated[
        bool, typer.Option("--measure", help="Also take such steps on this machine, and print their peak memory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict the memory of a training step from the config of a base, without its weights."""
    from inlay.study.plan import plan_base

    planned, peak = plan_base(
        model,
        method,
        width=width,
        batch_size=batch_size,
        length=length,
        labels=labels,
        crop=crop,
        channels=channels,
        spacing_mm=spacing_mm,
        dtype=dtype,  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
        optimizer=optimizer,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
        accumulate=accumulate,
        ema=ema,
        device=device,
        measure=take_steps,
    )
    if as_json:
        print(json.dumps({**vars(planned), "fits": planned.fits, "measured": peak}, indent=2))
        return
    print(planned)
    if peak is not None:
        print(f"measured: {peak / 1e6:,.1f} MB; predicted / measured: {planned.peak / peak:.3f}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Report what works on this machine: devices, precisions, 8-bit and 4-bit bases, image libraries."""
    from inlay.cli.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[finding.works]
        table.add_row(finding.what, mark, finding.remark)
    Console().print(table)


def _add_verb(name: str, verb: Callable[..., None], **settings: Any) -> None:
    """Register a verb. Each paragraph of its docstring is one line: rich would keep the line breaks of the source."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(name, help=help, context_settings=settings)(verb)


verb: Callable[..., None]
# The options of these depend on the adapter, so they parse the command line themselves.
for verb in (predict, evaluate):
    _add_verb(verb.__name__, verb, ignore_unknown_options=True, allow_extra_args=True, help_option_names=[])
# The options of a task's recipes are options of a comparison too.
for verb in (study.compare, study.tune):
    _add_verb(verb.__name__, verb, ignore_unknown_options=True, allow_extra_args=True)
for group in (measure, report, volumes, paint, combine, serve, compress, prune, hub, trust):
    for name, verb in group.VERBS.items():
        _add_verb(name, verb)


def main() -> None:
    """Entry point. A user's mistake is printed as one sentence, with exit status 2."""
    try:
        app()
    except InlayError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `inlay ... | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a full disk, a missing permission, a name that is too long
        print(f"error: {str(error.filename or 'the system')[:200]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
