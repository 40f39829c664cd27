"""Inference in bfloat16 next to float32 on this CPU, with what `set_precision` does to a model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bfloat16.py [--rounds 5] [--cases vit mobilenet sam]

    vit         ViT-B/16 at 224 pixels with a LoRA of rank 8 on q and v, random weights, 4 images
    mobilenet   MobileNetV2 1.0 with ImageNet weights on 32 photos of flowers, where both are on this machine
    sam         SAM ViT-B at 1024 pixels, random weights, 1 image and 1 point

Ways: `float32`; `channels last` in float32 (networks of convolutions only); `bfloat16` as `model.to(torch.bfloat16)`;
`auto`, what `--dtype auto` takes where bfloat16 pays. They take turns, round by round; figures are CPU time, ratios
those within a round, with the 10th and 90th percentile. `difference` is the largest of an output, relative to the
largest output; `agree` the share of equal classes, or of equal pixels of the mask. `speedup` is what the probe found.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    SamConfig,
    SamModel,
    ViTConfig,
    ViTForImageClassification,
)

from inlay import load_processor
from inlay.adapters import precision
from inlay.bases.bfloat16 import find_cpu_speedup
from inlay.tasks.images.processing import process_images

RESULTS = Path(__file__).parent / "results" / "bfloat16.json"
SHARED = Path(__file__).parents[3] / "shared" / "data"
MOBILENET = SHARED / "mobilenet_imagenet" / "hf" / "mobilenet_v2_1.0_224"
PHOTOS = SHARED / "flowers5" / "dev" / "val"


def make_case(case: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model in float32 and its inputs."""
    torch.manual_seed(0)
    if case == "vit":
        base = ViTForImageClassification(ViTConfig(num_labels=100))
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=8, init_lora_weights=False))
        return model.eval(), {"pixel_values": torch.randn(4, 3, 224, 224)}
    if case == "mobilenet":
        model = AutoModelForImageClassification.from_pretrained(MOBILENET, dtype=torch.float32)
        processor, photos = load_processor(str(MOBILENET)), sorted(PHOTOS.rglob("*.jpg"))[:200:6][:32]
        return model.eval(), process_images(processor, [Image.open(photo).convert("RGB") for photo in photos])
    model = SamModel(SamConfig()).eval()
    # The frequencies of places are of N(0, 1) in the published weights; transformers draws them much larger.
    torch.nn.init.normal_(model.shared_image_embedding.positional_embedding)
    return model, {"pixel_values": torch.randn(1, 3, 1024, 1024), "input_points": torch.tensor([[[[301.0, 515.0]]]])}


def make_ways(model: Any, convolutional: bool) -> dict[str, Any]:
    """The model in each way."""
    auto = copy.deepcopy(model)
    precision._convert(auto, torch.bfloat16, channels_last=convolutional)
    ways = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16), "auto": auto}
    if convolutional:
        ways["channels last"] = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return ways


def read_output(output: Any) -> torch.Tensor:
    """Logits of classes (B, K), or of the first mask's pixels as two classes (h w, 2)."""
    if hasattr(output, "logits"):
        return output.logits.float()
    mask = output.pred_masks[0, 0, 0].float().flatten()
    return torch.stack([-mask, mask], 1)


@torch.inference_mode()
def measure(case: str, rounds: int) -> dict[str, Any]:
    """A row for each way."""
    model, inputs = make_case(case)
    ways = make_ways(model, case == "mobilenet")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            pixels = inputs["pixel_values"].to(next(way.parameters()).dtype)
            begun = time.process_time()
            output = way(**{**inputs, "pixel_values": pixels})
            if turn:
                seconds[name].append(time.process_time() - begun)
            outputs[name] = read_output(output)
    whole, rows = outputs["float32"], {}
    for name, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(taken, seconds["float32"], strict=True))
        last = len(ratios) - 1
        rows[name] = {
            "cpu_s": round(statistics.median(taken), 4),
            "ratio": round(statistics.median(ratios), 3),
            "p10": round(ratios[round(0.1 * last)], 3),
            "p90": round(ratios[round(0.9 * last)], 3),
            "difference": round(float((outputs[name] - whole).abs().max() / whole.abs().max()), 5),
            "agree": round(float((outputs[name].argmax(1) == whole.argmax(1)).float().mean()), 4),
        }
        print(case, name, rows[name], flush=True)
    return rows


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=["vit", "mobilenet", "sam"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text())["cases"] if RESULTS.is_file() else {}
    for case in args.cases:
        if case == "mobilenet" and not (MOBILENET.is_dir() and PHOTOS.is_dir()):
            print(f"{MOBILENET} or {PHOTOS} is not on this machine; mobilenet is left out.")
            continue
        stored[case] = {"rounds": args.rounds, "ways": measure(case, args.rounds)}
    result = {
        "machine": describe_machine(),
        "speedup": round(find_cpu_speedup(fresh=True), 2),
        "cases": stored,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
