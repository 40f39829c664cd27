"""Load an adapter, checked against its base, and classify pictures with it.

python recipes/predict.py                                                  # the adapter of adapters_hub, on digits
python recipes/predict.py --adapter runs/lora_vit/adapter --images photo.jpg folder --grid sheet.png
"""

from dataclasses import dataclass, field

from inlay import run_recipe


@dataclass
class Recipe:
    """Which adapter, and on what."""

    adapter: str = field(
        default="adapters_hub/digits-lora-vit-tiny", metadata={"help": "Folder of an adapter, or its Hub id."}
    )
    images: list[str] = field(
        default_factory=list, metadata={"help": "Pictures or folders; default: 16 handwritten digits."}
    )
    merge: bool = field(default=False, metadata={"help": "Fold the adapter into its base first."})
    grid: str | None = field(default=None, metadata={"help": "Save a sheet of pictures and labels under this name."})


def main(recipe: Recipe) -> None:
    """Load, predict, show."""
    from inlay import load_adapter, load_images, predict
    from inlay.tasks.images.predict import draw_sheet, find_pictures

    # 1. pictures
    if recipe.images:
        pictures = names = find_pictures(recipe.images)
    else:
        held_out = load_images("builtin:digits").validation.select(range(16))
        pictures = [row["bytes"] for row in held_out["image"]]
        names = [f"a handwritten {label}" for label in held_out["label"]]

    # 2. adapter: wrong base, damaged file and changed output end here with one sentence
    adapter = load_adapter(recipe.adapter)
    if recipe.merge:
        adapter.merge()

    # 3. predict
    predictions = predict(adapter, pictures, top=3)

    # 4. show
    for name, p in zip(names, predictions, strict=True):
        print(name, *(f"{label} {value:.1%}" for label, value in zip(p.labels, p.probabilities, strict=True)), sep="  ")
    if recipe.grid:
        print("saved", draw_sheet(predictions, pictures, recipe.grid))


if __name__ == "__main__":
    run_recipe(main, Recipe())
