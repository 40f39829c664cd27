"""The verb `inlay prune`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import BaseOption, DeviceOption, JsonOption, printable
from inlay.errors import BadInput


def prune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ADAPTER", help="Embedded base, folder of a model or of an adapter, Hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The pruned model: a new folder.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Labelled data of the model's task, as its recipes take it.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="macs=SHARE, params=SHARE or latency=SHARE of what the model has.")
    ] = "macs=0.5",
    criterion: Annotated[
        str | None,
        typer.Option(
            help="taylor (the default), activation, thinet, apoz, batchnorm, l1, l2 or random; with --sparsity "
            "magnitude (the default) or wanda."
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="global: layers compete for units (the default); local: each keeps the same share, which transformers "
            "loads by itself."
        ),
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="Kinds of units that may go, such as mlp,heads; default: all.")
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Fit what reads the kept units by least squares.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps in which the target is reached.")] = 1,
    examples: Annotated[int, typer.Option(help="Training examples that the criterion looks at.")] = 256,
    heal: Annotated[int, typer.Option(metavar="STEPS", help="Train a LoRA for so many steps and merge it.")] = 0,
    heal_share: Annotated[float, typer.Option(help="Share of the parameters that this LoRA may have.")] = 0.05,
    compare: Annotated[
        bool, typer.Option("--compare", help="Prune at random as well, and train a model of this size from scratch.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Score at most this many examples.")] = None,
    carry: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Leave the adapter out of the base, and write it here, cut to fit."),
    ] = None,
    onto: Annotated[
        str | None, typer.Option(metavar="PRUNED", help="Only cut an adapter to fit this pruned form of its base.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Set this share of single weights to zero instead of leaving units out.")
    ] = None,
    scan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score with one layer pruned at a time: .png or .json."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    base: BaseOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model narrower or sparser until it costs what is asked for, heal it, and say what that did to it."""
    from inlay.compress.prune.carry import carry_adapter
    from inlay.compress.prune.run import Pruning, mask_to_folder, prune_to_folder
    from inlay.compress.prune.scan import check_scan_file, scan_sensitivity
    from inlay.compress.prune.trained import load_trained

    if onto is not None:
        if data or carry or scan or heal or compare or sparsity is not None:
            raise BadInput(
                "--onto only cuts an adapter to fit: --data, --carry, --scan, --heal, --compare and --sparsity prune a "
                "model; leave them out."
            )
        print(carry_adapter(model, onto, output, base=base))
        return
    if data is None:
        raise BadInput("--data is missing: labelled data on which the model is scored, such as builtin:digits.")
    if scan is not None:
        check_scan_file(scan)
    if sparsity is not None and (heal or compare or compensate or carry or units):
        raise BadInput(
            "--sparsity sets single weights to zero: --heal would fill them again, and --compare, --compensate, "
            "--carry and --units are for units; leave them out."
        )
    kinds = [kind.strip() for kind in units.split(",")] if units else []
    if sparsity is not None:
        report = mask_to_folder(
            model,
            data,
            output,
            sparsity=sparsity,
            criterion=criterion or "magnitude",
            scope=scope or "local",  # type: ignore[arg-type]
            examples=examples,
            limit=limit,
            base=base,
            device=device,
        )
    else:
        how = Pruning(
            target=target,
            criterion=criterion or "taylor",  # type: ignore[arg-type]
            scope=scope or "global",  # type: ignore[arg-type]
            units=kinds,
            compensate=compensate,
            steps=steps,
            examples=examples,
            heal_steps=heal,
            heal_share=heal_share,
            compare=compare,
            limit=limit,
            seed=seed,
        )
        report = prune_to_folder(model, data, output, how, base=base, carry=carry, device=device)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(printable, report.summary(output).split("\n"))))
    if scan is not None:
        found = scan_sensitivity(
            load_trained(model, base=base, device=device),
            data,
            criterion=criterion if criterion and sparsity is None else "taylor",  # a scan leaves out units
            compensate=compensate,
            kinds=kinds,
            examples=examples,
            limit=limit,
            seed=seed,
        )
        found.write(scan)
        if not as_json:
            print(f"\n{found}")


VERBS: dict[str, Callable[..., None]] = {"prune": prune}
