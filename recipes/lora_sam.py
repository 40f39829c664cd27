"""Teach SAM your kind of objects with LoRA, from pictures with maps of them, then measure and save the adapter.

    accelerate launch recipes/lora_sam.py                             # embedded base and data, no download
    accelerate launch recipes/lora_sam.py --model facebook/sam-vit-base --dataset FOLDER --where decoder
    accelerate launch recipes/lora_sam.py --method bottleneck --width 16 --learning_rate 1e-2

FOLDER has images/ and labels/ of equal stems; a label is a map of 8 or 16 bits in which each object has a number of its
own (`--meaning classes`: each class). In training, points and boxes are drawn from the maps, and pictures are turned
and mirrored. SAM: Kirillov et al. 2023, arXiv:2304.02643. LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, and how."""

    model: str = field(default="builtin:sam-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(default="builtin:scenes", metadata={"help": "Embedded, or folder of images/ and labels/."})
    method: Literal["lora", "bottleneck", "prefix", "partial"] = field(
        default="lora",
        metadata={"help": "What is added; partial: the last block, the neck and the decoder as they are."},
    )
    where: Literal["encoder", "decoder", "both"] = field(
        default="both", metadata={"help": "In the image encoder, the mask decoder or both."}
    )
    width: int = field(default=8, metadata={"help": "Rank, bottleneck size or prefix length; partial has none."})
    quantize: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the frozen encoder in 8 or 4 bits (bitsandbytes)."}
    )
    meaning: Literal["instances", "classes"] = field(
        default="instances", metadata={"help": "What a number in a map is: one object, or a class."}
    )
    crop: int | None = field(
        default=None, metadata={"help": "Take parts of so many pixels, for small objects in large pictures."}
    )


def method_of(model: Any, recipe: Recipe) -> Any:
    """peft's config, with the names of the modules in encoder and decoder."""
    from peft import LoraConfig

    from inlay import AttentionPrefixConfig, BottleneckConfig, PartialConfig
    from inlay.bases.sites import decoder_parts, decoder_targets, lora_targets, sites

    found, linear = sites(model), decoder_targets(model)
    attention = [name.removesuffix(".q_proj") for name in linear if name.endswith(".q_proj")]
    ends = [name for name in linear if name.endswith((".out_proj", ".lin2"))]
    places = {
        "lora": (lora_targets(model), linear),
        "bottleneck": ([*found.out, *found.mlp_out], ends),
        "prefix": (list(found.attention), attention),
        "partial": ([found.blocks[-1], "vision_encoder.neck"], decoder_parts(model)),
    }
    encoder, decoder = places[recipe.method]
    names = {"encoder": encoder, "decoder": decoder, "both": [*encoder, *decoder]}[recipe.where]
    if recipe.method == "lora":
        return LoraConfig(r=recipe.width, lora_alpha=2 * recipe.width, target_modules=names)
    if recipe.method == "bottleneck":
        return BottleneckConfig(width=recipe.width, target_modules=names)
    if recipe.method == "prefix":
        return AttentionPrefixConfig(length=recipe.width, target_modules=names)
    return PartialConfig(target_modules=names)


def mean_iou(model: Any, view: Any, loss: Any) -> float:
    """Of all prompts of a view of pictures, for the masks that the model thinks best."""
    import torch
    from torch.utils.data import DataLoader

    from inlay.tasks.masks.scores import MaskIoU

    metric, device = MaskIoU(), next(model.parameters()).device
    with torch.no_grad():
        for batch in DataLoader(view, batch_size=4):
            batch = {key: value.to(device) for key, value in batch.items()}
            counts, _ = loss.answers(loss(model, batch), batch)
            metric.add_batch(predictions=counts.cpu(), references=None)
    return metric.compute()["mean_iou"]


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from inlay import MaskLoss, MaskView, fit, load_base, load_masks, load_processor, save_adapter
    from inlay.measure import cost
    from inlay.tasks.masks.scores import MaskIoU
    from inlay.tasks.masks.view import collate_masks

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_masks(recipe.dataset, seed=train.seed, meaning=recipe.meaning)
    model, processor, loss = load_base(recipe.model, quantize=recipe.quantize), load_processor(recipe.model), MaskLoss()

    def held_out(prompts: Any) -> MaskView:
        return MaskView(data.validation, processor, prompts, count=16, seed=0, crop=recipe.crop, meaning=data.meaning)

    # 2. method: only the adapter is trainable
    model = get_peft_model(model, method_of(model, recipe))

    # 3. train, on points and boxes by turns
    result = fit(
        model,
        MaskView(data.train, processor, turn=True, crop=recipe.crop, meaning=data.meaning),
        held_out("point"),
        train,
        metrics=[MaskIoU()],
        collate=collate_masks,
        loss=loss,
        settings=asdict(recipe),
    )

    # 4. measure, beside the base without the adapter
    after = {kind: mean_iou(model, held_out(kind), loss) for kind in ("point", "points", "box")}
    with model.disable_adapter():
        before = {kind: mean_iou(model, held_out(kind), loss) for kind in after}
    example = {key: value[None] for key, value in held_out("box")[0].items() if key != "labels"}
    metrics = {
        "validation": {
            **result.metrics,
            **{f"mean_iou_{kind}": value for kind, value in after.items()},
            **{f"mean_iou_{kind}_before": value for kind, value in before.items()},
        },
        "dataset": data.name,
        "history": result.history,
        "cost": cost(model, example),
        "training": {
            **asdict(recipe),
            **train.identity(),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
        },
    }

    # 5. save
    folder = save_adapter(model, Path(train.output_dir) / "adapter", processor=processor, metrics=metrics)
    said = ", ".join(f"{kind} {before[kind]:.3f} -> {after[kind]:.3f}" for kind in after)
    PartialState().print(f"mean IoU without and with the adapter: {said}; saved {folder}")
    return folder


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/lora_sam", epochs=8, batch_size=8))
