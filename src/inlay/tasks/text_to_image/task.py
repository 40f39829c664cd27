"""Text to image: a pipeline of diffusers that paints what a prompt says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import Unsupported
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.train.losses import Loss

logger = logging.getLogger(__name__)

GOLDEN_PROMPT = "a photo of a dog and a toy on grass"


class TextToImage(Task):
    """Bases are pipelines of diffusers: Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3. They have no labels."""

    name = "text-to-image"
    auto_class = "AutoModel"
    base_noun = "a text-to-image pipeline"
    hub_tag = "text-to-image"
    base_kinds = ("diffusion",)
    stores_few_bits = False
    compares_images = True
    library = "diffusers"
    function = "paint"
    main_score = "loss"
    smaller_is_better = True
    limits = "It paints what it has seen: subjects of a few images come back in poses and places like those."
    usage = (
        'from inlay import load_adapter, paint\n\nadapter = load_adapter("FOLDER")\n'
        'paint(adapter, "a photo of sks dog on grass")[0].save("dog.png")'
    )
    inputs = "prompts, to paint images of"
    options: ClassVar[Mapping[str, Option]] = {
        "seeds": Option(int, "Images of each prompt.", 1, least=1),
        "seed": Option(int, "Seed of the first image of a prompt; the next have the numbers after it.", 0, least=0),
        "steps": Option(int | None, "From noise to image; default: the pipeline's own.", least=1),
        "guidance": Option(float | None, "Scale of classifier-free guidance; default: the pipeline's own.", least=0),
        "negative_prompt": Option(str | None, "What images should not show.", metavar="PROMPT"),
        "image_size": Option(int | None, "Pixels a side; default: those that it was trained on.", least=1),
        "weight": Option(float, "Of a LoRA adapter: 1 as it was trained, 0 the base.", 1.0),
        "sheet": Option(Path | None, "Save all images as one sheet, a row for each prompt.", metavar="FILE.png"),
        "output": Option(Path | None, "Save each image as a PNG in this folder.", metavar="FOLDER"),
    }

    def takes_base(self, config: Any) -> bool:
        from inlay.bases.diffusion.config import is_diffusion

        return is_diffusion(config)

    def takes_processor(self, processor: Any) -> bool:
        from inlay.tasks.text_to_image.processor import PromptProcessor

        return isinstance(processor, PromptProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        from inlay.tasks.text_to_image.processor import load_prompt_processor

        return load_prompt_processor(base_name, settings)

    def save_processor(self, processor: Any, folder: Any) -> None:
        """The pipeline's folder has its tokenizers already."""

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """A made image with fixed noise at a middle level, and a prompt."""
        return _make_inputs(model, processor, [GOLDEN_PROMPT])

    def golden_values(self, output: Any, count: int) -> Tensor:
        """Numbers of the prediction, evenly spaced."""
        flat = output.prediction.flatten()
        return flat[:: max(1, len(flat) // count)][:count]

    def loading_code(self, model: nn.Module, folder: str) -> list[str]:
        config: Any = model.config
        absent = config.pipeline == "StableDiffusion3Pipeline" and "text_encoder_3" not in config.parts
        without = ", text_encoder_3=None, tokenizer_3=None" if absent else ""  # which diffusers wants to be told
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{folder}"{without})',
        ]

    def leave_out_idle_layers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without LoRA of the VAE, whose B is still zero: `target_modules=["to_q"]` names layers there, too.

        diffusers loads no adapter of a VAE, so that one layer would keep it from loading the others.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in weights.items():
            layer, _, leaf = key.partition(".lora_")
            if ".vae." in layer and leaf:
                groups.setdefault(layer, {})[leaf] = value
        idle = {layer for layer, own in groups.items() if all(not own[leaf].any() for leaf in own if leaf[0] == "B")}
        if idle:
            logger.warning(
                "LoRA on %d layers of the VAE (%s) is not saved: it was not trained, and changes nothing. Choose the "
                "layers by pipeline_targets(model).",
                len(idle), min(idle).removeprefix("base_model.model."),
            )  # fmt: skip
        return {key: value for key, value in weights.items() if key.partition(".lora_")[0] not in idle}

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        return _make_inputs(model, processor, ["a red dog", "a blue toy"])

    def graph_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        raise Unsupported(
            "a text-to-image pipeline is no single graph; inlay merge writes it as a folder of diffusers."
        )

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.text_to_image.options import TextToImageTask

        return TextToImageTask

    def load_labelled(
        self,
        adapter: Adapter,
        data: str,
        count: int,
        seed: int,
        training: Training,
        *,
        held_out: bool = False,
    ) -> LabelledBatches:
        """Images with prompts, at fixed noise."""
        from torch.utils.data import default_collate

        from inlay.tasks.text_to_image.data import load_captioned
        from inlay.tasks.text_to_image.loss import DenoisingLoss
        from inlay.tasks.text_to_image.view import PromptView

        found = load_captioned(data, seed=training.seed)
        rows = (found.validation if held_out else found.train)[:count]
        config = adapter.model.config
        view = PromptView(rows, adapter.processor, seed=seed, levels=config.train_timesteps)
        loss = DenoisingLoss(prediction_type=str(config.scheduler.get("prediction_type", "epsilon")))
        return LabelledBatches(view, default_collate, loss, rows=4)

    def score_batches(self, model: Callable[..., Any], batches: Sequence[dict[str, Tensor]], loss: Loss) -> float:
        """The negative mean loss."""
        import torch

        with torch.no_grad():
            losses = [float(loss(model, batch).loss) for batch in batches]
        return -sum(losses) / len(losses)

    def compute_features(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        raise Unsupported("a text-to-image pipeline has no features that a head reads.")

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        """Images of the size that the base was trained on, with prompts of the full length."""
        import torch

        from inlay.bases.diffusion.families import T5_TOKENS
        from inlay.tasks.text_to_image.loss import DenoisingLoss

        config, tokens = base.config, {}
        for name in config.text_encoders:
            longest = config.parts[name]["config"].get("max_position_embeddings", T5_TOKENS)
            tokens[name.replace("text_encoder", "input_ids")] = torch.zeros(rows, longest, dtype=torch.long)
        side = config.image_size
        batch = {
            "pixel_values": torch.zeros(rows, 3, side, side),
            **tokens,
            "timesteps": torch.zeros(rows, dtype=torch.long),
            "noise": torch.zeros(rows, config.latent_channels, *[side // config.latent_scale] * 2),
        }
        return batch, DenoisingLoss()

    def forward_inputs(self, base: Any, rows: int, length: int, size: int | None = None) -> dict[str, Tensor]:
        """As `Task.forward_inputs`, with noise of the size of the latents."""
        inputs = super().forward_inputs(base, rows, length, size)
        side = inputs["pixel_values"].shape[-1] // base.config.latent_scale
        inputs["noise"] = inputs["noise"].new_zeros(rows, base.config.latent_channels, side, side)
        return inputs

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.text_to_image.paint import (
            Sampling,
            check_outputs,
            check_prompts,
            draw_paintings,
            paint_pairs,
            save_paintings,
        )

        check_prompts(inputs)
        sheet, output = options["sheet"], options["output"]
        check_outputs(sheet, output)
        seeds = range(options["seed"], options["seed"] + options["seeds"])
        sampling = Sampling(
            options["steps"], options["guidance"], options["negative_prompt"], options["image_size"], options["weight"]
        )
        pairs = [(prompt, seed) for prompt in inputs for seed in seeds]

        def answer(adapter: Adapter) -> Answer:
            images = paint_pairs(adapter, pairs, sampling)
            lines, facts = [], [{"prompt": prompt, "seed": seed} for prompt, seed in pairs]
            if output is not None:
                for fact, path in zip(facts, save_paintings(images, pairs, output), strict=True):
                    fact["file"] = str(path)
                lines.append(f"{len(images)} images in {output}")
            if sheet is not None:
                rows = [images[i : i + len(seeds)] for i in range(0, len(images), len(seeds))]
                draw_paintings(rows, inputs, sheet, columns=[f"seed {seed}" for seed in seeds])
                lines.append(f"sheet: {sheet}")
            return Answer(lines, {"images": facts} | ({} if sheet is None else {"sheet": str(sheet)}))

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.text_to_image.evaluate import evaluate

        return evaluate(adapter, data, request)

    def describe_inputs(self, record: Record) -> list[str]:
        size = record["preprocessing"].get("image_size")
        return ["Prompts", f"Trained on images of {size} x {size} pixels, each with its prompt."]


def _make_inputs(model: Any, processor: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Images and noise that are the same on every machine, at noise levels in the middle."""
    import torch

    count, side = len(prompts), processor.image_size
    config = getattr(model, "config", None)
    channels, height, width = processor.latent_shape
    grid = torch.linspace(-1, 1, side)
    waves = torch.stack([torch.sin(4 * grid + i) for i in range(3)])  # 3 S
    pixels = (waves[:, :, None] * waves[:, None, :].flip(-1)).expand(count, 3, side, side).contiguous()
    generator = torch.Generator().manual_seed(0)
    levels = torch.full((count,), int(getattr(config, "train_timesteps", 1000)) // 2)
    noise = torch.randn(count, channels, height, width, generator=generator)
    return {"pixel_values": pixels, **processor.tokenize(prompts), "timesteps": levels, "noise": noise}
