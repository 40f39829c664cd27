"""Load an adapter, checked against its base, and classify images with it.

python recipes/predict.py                                                  # the adapter of adapters_hub, on digits
python recipes/predict.py --adapter runs/lora_vit/adapter --images photo.jpg folder --grid sheet.png
"""

from dataclasses import dataclass

from inlay import option, run_recipe


@dataclass
class Prediction:
    """Adapter and inputs."""

    adapter: str = option("adapters_hub/digits-lora-vit-tiny", "Folder of an adapter, or its Hub id.")
    images: list[str] = option([], "Images, or folders of images; default: 16 handwritten digits.")
    merge: bool = option(False, "Merge the adapter into its base first.")
    grid: str | None = option(None, "Save a sheet of the images and their labels to this file.")


def main(prediction: Prediction) -> None:
    """Load, predict, show."""
    from inlay import draw_sheet, find_pictures, load_adapter, load_images, predict

    # 1. images
    if prediction.images:
        images = names = find_pictures(prediction.images)
    else:
        held_out = load_images("builtin:digits").validation.select(range(16))
        images = [row["bytes"] for row in held_out["image"]]
        names = [f"a handwritten {label}" for label in held_out["label"]]

    # 2. adapter: a wrong base, a damaged file or a changed output ends here with one sentence
    adapter = load_adapter(prediction.adapter)
    if prediction.merge:
        adapter.merge()

    # 3. predict
    predictions = predict(adapter, images, top=3)

    # 4. show
    for name, p in zip(names, predictions, strict=True):
        print(name, *(f"{label} {value:.1%}" for label, value in zip(p.labels, p.probabilities, strict=True)), sep="  ")
    if prediction.grid:
        print("saved", draw_sheet(predictions, images, prediction.grid))


if __name__ == "__main__":
    run_recipe(main, Prediction())
