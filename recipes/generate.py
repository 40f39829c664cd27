"""Load a language model's adapter, checked against its base, and write texts with it.

python recipes/generate.py                                                  # the adapter of adapters_hub
python recipes/generate.py --adapter runs/lora_gpt2/adapter --prompts "name[The Silver Oak], food[Thai]" --beams 4
python recipes/generate.py --adapter runs/lora_gpt2/adapter --dataset builtin:restaurants --scores scores.json
"""

import json
from dataclasses import dataclass
from pathlib import Path

from inlay import BadInput, Decoding, option, run_recipe

PROMPTS = [
    "name[The Quiet Fox], eatType[pub], food[Thai], priceRange[cheap], area[riverside]",
    "name[The Silver Oak], eatType[bistro], customer rating[high], familyFriendly[yes], near[Chess Museum]",
]


@dataclass
class Generation:
    """Adapter and inputs."""

    adapter: str = option("adapters_hub/restaurants-lora-gpt2-tiny", "Folder of an adapter, or its Hub id.")
    prompts: list[str] = option(PROMPTS, "Prompts to continue.")
    dataset: str | None = option(
        None, "Continue the prompts of this data's test split, or its held-out ones, and score the texts."
    )
    scores: str | None = option(None, "Write texts and scores to this JSON file.")
    merge: bool = option(False, "Merge the adapter into its base first.")

    def __post_init__(self) -> None:
        if not self.scores:
            return
        if not self.dataset:
            raise BadInput("scores need a dataset to compare the texts with; set --dataset, or leave --scores out.")
        if not Path(self.scores).parent.is_dir() or Path(self.scores).is_dir():
            raise BadInput(f"scores must be a file in an existing folder, got {self.scores!r}.")


def main(generation: Generation, decoding: Decoding) -> None:
    """Load, write, score."""
    from inlay import generate, judge, load_adapter, load_texts

    # 1. adapter: wrong base, damaged file and changed output end here with one sentence
    adapter = load_adapter(generation.adapter)
    if generation.merge:
        adapter.merge()

    # 2. prompts from the command line
    if generation.dataset is None:
        texts = generate(adapter.model, adapter.processor, generation.prompts, decoding)
        for prompt, text in zip(generation.prompts, texts, strict=True):
            print(f"{prompt}\n    {text}")
        return

    # 3. prompts of a data set, with its completions as references; the seed holds out the same ones as in training
    seed = (adapter.file.metrics.get("training") or {}).get("seed", 0)
    scores = judge(adapter.model, adapter.processor, load_texts(generation.dataset, seed=seed), decoding)
    print(f"{scores}\n{scores.signature}" if scores else "running text has no prompts to score")
    if scores and generation.scores:
        Path(generation.scores).write_text(json.dumps({"total": scores.total, "by_prompt": scores.by_prompt}, indent=1))


if __name__ == "__main__":
    run_recipe(main, Generation(), Decoding(max_new_tokens=96))
