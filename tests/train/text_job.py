"""As train_job.py, of a language model: GPT-2 with dropout and LoRA, on texts of different lengths.

python tests/train/text_job.py --out weights.safetensors --output_dir run [any option of TrainConfig]
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from train_job import trainable
from transformers import GPT2Config, GPT2LMHeadModel

from inlay import NextToken, TextProcessor, TextView, TrainConfig, fit, load_tokenizer, run_recipe
from inlay.methods import METHODS

SENTENCE = "the silver oak is a cheap pub by the river that serves good french food and wine to all who ask"
WORDS = SENTENCE.split()


@dataclass
class Job:
    """What is trained."""

    out: str = field(default="", metadata={"help": "File for the final weights."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of the model."})
    pause: float = field(default=0.0, metadata={"help": "Seconds that a step waits."})


class Rows:
    """Prompts of one to three words, and completions of 1 to 18, as a split of `TextData` gives them."""

    def __init__(self, count: int, seed: int) -> None:
        drawn = torch.randint(1, 19, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
        self.columns = {
            "prompt": [" ".join(WORDS[-1 - first % 3 :]) for first, _ in drawn],
            "completion": [" ".join(WORDS[:length]) for _, length in drawn],
        }

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, part: slice | str) -> dict[str, list[str]] | list[str]:
        if isinstance(part, str):
            return self.columns[part]
        return {name: values[part] for name, values in self.columns.items()}


def base(dropout: float = 0.1, width: int = 32) -> GPT2LMHeadModel:
    """Two blocks with random weights, the same ones at every call."""
    torch.manual_seed(7)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 2048}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0, initializer_range=0.1))


def adapt(model: torch.nn.Module) -> torch.nn.Module:
    """With LoRA of rank 4, whose matrices are the same ones at every call."""
    torch.manual_seed(8)
    return METHODS["lora"].adapt(model.requires_grad_(False), 4)


def views() -> tuple[TextView, TextView]:
    """44 examples for training, 13 for validation."""
    processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"), max_length=64)
    return TextView(Rows(44, 1), processor), TextView(Rows(13, 2), processor)


class Paused(NextToken):
    """The loss, after a while."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(smoothing=0.1)
        self.pause = pause

    def __call__(self, model: torch.nn.Module, batch: dict) -> object:
        time.sleep(self.pause)
        return super().__call__(model, batch)


def main(job: Job, train: TrainConfig) -> None:
    """Train, and write what came out."""
    torch.set_num_threads(1)
    model, (examples, held_out) = adapt(base(job.dropout)), views()
    result = fit(model, examples, held_out, train, collate=examples.collate, loss=Paused(job.pause))
    if PartialState().is_main_process:
        save_file(trainable(model), Path(job.out))
    print(f"done: resumed {result.resumed}, step {result.steps}", flush=True)


if __name__ == "__main__":
    run_recipe(main, Job(), TrainConfig())
