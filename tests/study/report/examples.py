"""A comparison of fifteen methods with numbers like those of docs/benchmarks/images.md, for what shows comparisons."""

import math
import random

from inlay.methods import METHODS
from inlay.study.comparison import Comparison, Row

SCORES = {
    "full": 0.98,
    "lora": 0.972,
    "dora": 0.971,
    "convpass": 0.966,
    "ssf": 0.955,
    "bottleneck-linear": 0.951,
    "adapter-plus": 0.946,
    "bottleneck": 0.943,
    "ia3": 0.922,
    "partial": 0.916,
    "visual-prompt": 0.902,
    "bias": 0.89,
    "visual-prompt-shallow": 0.87,
    "attention-prefix": 0.86,
    "probe": 0.74,
}
TRAINED = (459562, 56266, 59722, 18762, 9802, 14090, 4546, 14090, 3274, 113002, 4042, 5386, 1738, 7114, 970)
BASE_MS = 6.0


def make_row(method: str, score: float, trained: int, seeds: int, numbers: random.Random) -> Row:
    """One method; attention-prefix has a seed and a rate at which it diverged."""
    kind, merges, rate = METHODS[method].kind, METHODS[method].merges, METHODS[method].learning_rate
    added = 0.0 if kind in ("baseline", "part") else numbers.uniform(0.1, 0.4)
    scores = [score + numbers.gauss(0, 0.004) for _ in range(seeds)]
    curve = {rate * factor: score - 0.1 * abs(math.log10(factor)) for factor in (0.1, 0.3, 1.0, 3.0)}
    failed = []
    if method == "attention-prefix":
        curve[rate * 3.0], failed = math.nan, [f"learning rate {rate * 3}, seed 0: the loss became NaN"]
        if seeds > 2:
            scores[2] = math.nan
    costs = {
        "trainable_parameters": trained,
        "file_bytes": 4 * trained + 8000,
        "mmacs": 30 * (1 + added / 3),
        "base_mmacs": 30.0,
        "latency_ms": BASE_MS * (1 + added),
        "base_latency_ms": BASE_MS,
        "peak_bytes": 40_000_000 + 12 * trained,
    } | ({"merged_latency_ms": BASE_MS} if merges else {})
    return Row(
        method=method,
        learning_rate=rate,
        width=8,
        curve=curve,
        edge=method == "partial",
        scores={"accuracy": scores, "ece": [0.02] * seeds},
        validation=scores,
        forgetting={"own_task": [0.1] * seeds, "drift": [0.05] * seeds},
        costs=costs,
        merges=merges,
        seconds=60.0,
        failed=failed,
    )


def make_comparison(*, seeds: int = 5, data: str = "builtin:digits", base: str = "builtin:vit-tiny") -> Comparison:
    """The same each time."""
    numbers = random.Random(0)
    rows = [
        make_row(name, score, trained, seeds, numbers)
        for (name, score), trained in zip(SCORES.items(), TRAINED, strict=True)
    ]
    return Comparison(
        base=base,
        data=data,
        task="image-classification",
        score="accuracy",
        larger_is_better=True,
        seeds=list(range(seeds)),
        counts={"train": 1078, "validation": 359, "test": 360},
        budget={"steps": 340, "batch_size": 32},
        rows=rows,
        refused={"lora-conv": "ViT has no grouped convolutions; use lora."},
        search_seconds=1260.0,
        seconds=2460.0,
        about={"device": "cpu", "threads": 1, "versions": {"torch": "2.13.0"}, "settings": {"image size": 32}},
    )
