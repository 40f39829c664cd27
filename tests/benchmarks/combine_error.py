"""The sum of two LoRAs as `inlay.combine` and as peft's `add_weighted_adapter` have it, beside the true sum in float64.

    python tests/benchmarks/combine_error.py

Random adapters on the modules q, v and fc1 of a ViT of width 192. The error is ‖found - Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖ over
all modules, ΔW_i being what peft says that each adapter adds to a weight. Of one adapter with weight 1 the right answer
is that adapter. Of other methods it is the difference to both adapters active at once, beside what these two do:
‖h_sum - h_both‖ / ‖h_both - h_base‖ over the last hidden states.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from inlay.combine import combine
from inlay.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "combine_error"
KINDS = ("linear", "cat", "svd", "ties")
CASES: dict[str, tuple[list[dict[str, Any]], list[float]]] = {
    "two of rank 8": ([{}, {}], [1.0, 1.0]),
    "weights 0.7 and -1.3": ([{}, {}], [0.7, -1.3]),
    "ranks 8 and 4": ([{}, {"r": 4}], [1.0, 1.0]),
    "rsLoRA": ([{"use_rslora": True}, {"use_rslora": True}], [1.0, 1.0]),
    "rsLoRA, one alone": ([{"use_rslora": True}], [1.0]),
    "other modules": ([{}, {"target_modules": ["q_proj", "k_proj"]}], [1.0, 1.0]),
}
OTHERS = (
    "bottleneck",
    "bottleneck-parallel",
    "bottleneck-linear",
    "attention-prefix",
    "visual-prompt",
    "partial",
    "mam",
)


def base() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8))


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """ΔW by module, in float64."""
    found = {}
    for key, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            scale = module.scaling[name]
            found[key] = scale * module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
    return {key: value.detach() for key, value in found.items()}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    lost = sum((found.get(key, torch.zeros_like(value)) - value).square().sum() for key, value in wanted.items())
    whole = sum(value.square().sum() for value in wanted.values())
    return float((lost / whole) ** 0.5)


def states(model: Any) -> torch.Tensor:
    """The last hidden states, in float64."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return model.double().eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]


def other_row(method: str, folder: Path) -> dict[str, Any]:
    """Two adapters of a method of METHODS."""
    for seed, name in enumerate("ab", 1):
        model = get_peft_model(base(), METHODS[method].config(base(), 8))
        torch.manual_seed(seed)
        for value in model.parameters():
            if value.requires_grad:
                value.data += 0.02 * torch.randn_like(value)
        model.save_pretrained(folder / name)
    both = PeftModel.from_pretrained(base(), str(folder / "a"), adapter_name="a")
    both.load_adapter(str(folder / "b"), adapter_name="b")
    both.base_model.set_adapter(["a", "b"])
    wanted = states(both)
    combine({folder / "a": 1.0, folder / "b": 1.0}, out=folder / "sum")
    ours = PeftModel.from_pretrained(base(), str(folder / "sum"), adapter_name="sum")
    found: dict[str, Any] = {"inlay add": float((states(ours) - wanted).norm() / (wanted - states(base())).norm())}
    for kind in KINDS:
        try:
            both.add_weighted_adapter(["a", "b"], [1.0, 1.0], kind, combination_type=kind)
            raise AssertionError(f"peft combines {method}: measure it")
        except (ValueError, RuntimeError, KeyError, AttributeError) as reason:
            found[f"peft {kind}"] = type(reason).__name__
    return found


def row(settings: list[dict[str, Any]], weights: list[float], folder: Path) -> dict[str, Any]:
    names = [f"n{i}" for i in range(len(settings))]
    for seed, (name, own) in enumerate(zip(names, settings, strict=True)):
        config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "fc1"], **own})
        model = get_peft_model(base(), config)
        torch.manual_seed(seed + 1)
        for key, value in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.02)
        model.save_pretrained(folder / name)
    model = PeftModel.from_pretrained(base(), str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), adapter_name=name)
    wanted: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for key, value in deltas(model, name).items():
            wanted[key] = wanted.get(key, 0) + weight * value
    combine({folder / name: weight for name, weight in zip(names, weights, strict=True)}, out=folder / "sum")
    ours = PeftModel.from_pretrained(base(), str(folder / "sum"), adapter_name="sum")
    found: dict[str, Any] = {"inlay add": error(deltas(ours, "sum"), wanted)}
    for kind in KINDS:
        try:
            more = {"density": 0.5} if kind == "ties" else {}
            model.add_weighted_adapter(names, weights, kind, combination_type=kind, **more)
            found[f"peft {kind}"] = error(deltas(model, kind), wanted)
        except (ValueError, RuntimeError, KeyError, AttributeError) as reason:
            found[f"peft {kind}"] = f"{type(reason).__name__}"
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    table = {}
    for case, (settings, weights) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            table[case] = row(settings, weights, Path(folder))
    for method in OTHERS:
        with tempfile.TemporaryDirectory() as folder:
            table[f"two of {method}"] = other_row(method, Path(folder))
    columns = list(next(iter(table.values())))
    lines = ["| relative error of the update | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for case, found in table.items():
        cells = (
            f"{v:.1e}" if isinstance(v, float) and v < 0.01 else f"{v:.0%}" if isinstance(v, float) else v
            for v in found.values()
        )
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    found = {"machine": describe_machine(), "cases": table}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
