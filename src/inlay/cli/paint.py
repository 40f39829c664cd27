"""The verb `inlay paint`: subjects of several adapters next to each other in one image."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import BaseOption, DeviceOption, JsonOption, show
from inlay.errors import BadInput


def paint(
    regions: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=PROMPT...", help="From left to right: a folder or Hub id, and what it paints there."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the next have the numbers after it.")] = 0,
    overlap: Annotated[float, typer.Option(help="Share of a region's window that the next one covers too.")] = 0.25,
    steps: Annotated[int | None, typer.Option(min=1, help="From noise to image; default: the pipeline's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance; default: the pipeline's own.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="PROMPT", help="What images should not show.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of a window; default: those of the base.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Save all images as one sheet.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save each image as a PNG in this folder.")
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Paint the subjects of several adapters next to each other, such as `paint dog="a photo of sks dog on grass"
    toy="a photo of zwx toy on grass" --sheet both.png`. Each adapter acts in its own part of the image, so that none
    is lost, as it may be when adapters are added.
    """
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.fetch import fetch
    from inlay.serve.bank import Bank
    from inlay.tasks.text_to_image.paint import Sampling, check_outputs, draw_paintings, save_paintings
    from inlay.tasks.text_to_image.regions import Region, paint_regions

    asked = [_parse_region(text) for text in regions]
    check_outputs(sheet, output)
    adapters = {name: name for name, _ in asked}
    base = base or read_adapter(fetch(asked[0][0])).base_name
    sampling = Sampling(steps, guidance, negative_prompt, image_size)
    numbers = range(seed, seed + seeds)
    images = paint_regions(
        Bank(base, adapters, device=device),
        [Region(name, prompt) for name, prompt in asked],
        seeds=numbers,
        overlap=overlap,
        sampling=sampling,
    )
    caption = "; ".join(prompt for _, prompt in asked)
    facts: dict[str, object] = {"seeds": list(numbers), "pixels": list(images[0].size)}
    if output is not None:
        facts["images"] = [str(path) for path in save_paintings(images, [(caption, each) for each in numbers], output)]
    if sheet is not None:
        draw_paintings([images], [caption], sheet, columns=[f"seed {each}" for each in numbers])
        facts["sheet"] = str(sheet)
    show(facts, as_json)


def _parse_region(text: str) -> tuple[str, str]:
    """An adapter and its prompt."""
    name, found, prompt = text.partition("=")
    if not (name.strip() and prompt.strip()):
        said = "has no prompt" if found else "has no '='"
        raise BadInput(f'{text!r} {said}; give ADAPTER=PROMPT, such as runs/dog/adapter="a photo of sks dog on grass".')
    return name, prompt


VERBS: dict[str, Callable[..., None]] = {"paint": paint}
