"""Pre-train the embedded language model, on text that comes with Python and on generated text, on two CPU cores.

python recipes/pretrain/gpt2.py                          # builtin:gpt2-tiny, about 15 minutes on 2 quiet cores
"""

import ast
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as reference
from typing import Any

from inlay import option, run_recipe
from inlay.builtin.restaurants import generate_descriptions, rename_places, split_descriptions, write_out
from inlay.files.atomic import writing

END, BLOCK = "<|endoftext|>", 256  # tokens


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("src/inlay/builtin/gpt2-tiny", "Where the base is saved.")
    steps: int = option(2200, "Optimiser steps.", least=1)
    batch_size: int = option(8, "Blocks of 256 tokens a step.", least=1)
    learning_rate: float = option(6e-3, "Peak rate of AdamW and of Muon.", above=0)
    seed: int = option(0, "Seed of weights, descriptions and batches.", least=0)


def documents() -> list[str]:
    """The docstrings of each file of the standard library, and each topic of the language reference; none twice."""
    library, seen, found = Path(ast.__file__).parent, set[str](), list[list[str]]()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(library).parts):
            nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented))
            texts = dict.fromkeys(ast.get_docstring(node) or "" for node in nodes)
            found.append([text for text in texts if len(text) > 60 and text not in seen])
            seen.update(found[-1])
    return ["\n\n".join(texts) for texts in found if texts] + [reference[name].strip() for name in sorted(reference)]


def new_model(texts: list[str]) -> tuple[Any, Any]:
    """A GPT-2 of 1.5 M parameters, and a byte-level BPE of 2,048 tokens trained on the texts."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    new = GPT2Tokenizer(vocab={END: 0}, pad_token=END, model_max_length=BLOCK)
    tokenizer = new.train_new_from_iterator(texts, 2048, show_progress=False)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    size = {"vocab_size": len(tokenizer), "n_positions": BLOCK, "n_embd": 128, "n_layer": 6, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**size, **special, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model.loss_type = "ForCausalLM"  # transformers lists no loss for this class and would warn
    return model, tokenizer


def new_optimizers(model: Any, recipe: Pretraining) -> list[Any]:
    """As in vit.py: Muon for the matrices of the blocks, AdamW for the rest, with warm-up and cosine."""
    import torch
    from transformers import get_scheduler

    inner = {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name}
    outer = [p for name, p in model.named_parameters() if name not in inner]
    adamw = torch.optim.AdamW(outer, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(inner.values(), lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [(o, get_scheduler("cosine", o, 60, recipe.steps)) for o in (adamw, muon)]


CARD = """\
# gpt2-tiny

A `GPT2LMHeadModel` ({config.n_layer} blocks of width {config.n_embd}, {config.n_positions} positions), {size:,}
parameters in fp16, with a byte-level BPE of {config.vocab_size:,} tokens: the language model that inlay embeds, so that
recipes and tests run without a download. It is truly pre-trained, and of little use beyond that.

- **Trained on** {tokens[0].shape[0]:,} tokens of prose (docstrings and language reference of Python {python}) and
  {tokens[1].shape[0]:,} of descriptions by `inlay.builtin.restaurants` (hotels, films, gadgets, parks), many of
  whose names are drawn from the words of the prose; torch {torch}.
- **Quality**: perplexity per token {trained[0]:.1f} on held-out prose, {trained[1]:.2f} on held-out descriptions and
  {trained[2]:.2f} on restaurants, which it never saw, measured with the stored fp16 weights (untrained
  {untrained[0]:,.0f}, {untrained[1]:,.0f} and {untrained[2]:,.0f}).
- **Made by** `recipes/pretrain/gpt2.py`: seed {recipe.seed}, {recipe.steps:,} steps of {recipe.batch_size} blocks.
- **Licence**: Apache-2.0, as inlay. Python's texts (PSF licence) were read for training only; none is stored here.
"""


def main(recipe: Pretraining) -> None:
    """Collect, train, measure, save."""
    import torch

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor(tokenizer(END.join([*texts, ""]), verbose=False)["input_ids"])

    def loss_of(blocks: torch.Tensor) -> torch.Tensor:
        return model(input_ids=blocks, attention_mask=torch.ones_like(blocks), labels=blocks).loss  # of B N, the mean

    @torch.inference_mode()
    def perplexities() -> list[float]:
        each = [[loss_of(block[None]) for block in ids.split(BLOCK)[:-1]] for ids in tests]
        return [float(torch.stack(losses).mean().exp()) for losses in each]

    # 1. data: every 20th document, the last 50 meanings of each topic and all restaurants are held out
    files, described = documents(), split_descriptions(recipe.seed)
    unknown = generate_descriptions("restaurants", 200, seed=recipe.seed, references=3)
    prose = [text for i, text in enumerate(files) if i % 20]
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", " ".join(prose))))
    pairs = write_out(rename_places(described["train"], words, recipe.seed))
    held_out = files[::20], write_out(described["test"]), write_out(unknown)

    # 2. model, and the texts as its tokens
    torch.manual_seed(recipe.seed)
    model, tokenizer = new_model(prose + pairs)
    learnt, tests = [tokens(prose), tokens(pairs)], [tokens(texts) for texts in held_out]
    untrained = perplexities()

    # 3. train, on blocks from anywhere
    stream, optimizers = torch.cat(learnt), new_optimizers(model.train(), recipe)
    for step in range(recipe.steps):
        starts = torch.randint(len(stream) - BLOCK + 1, (recipe.batch_size, 1))
        (loss := loss_of(stream[starts + torch.arange(BLOCK)])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in optimizers:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}", flush=True)

    # 4. measure, as it will be stored: in fp16
    model = model.half().float().eval()
    trained = perplexities()

    # 5. save, with its card
    with writing(recipe.folder) as folder:
        model.half().save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        figures = {"untrained": untrained, "trained": trained, "tokens": learnt, "size": model.num_parameters()}
        versions = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
        (folder / "README.md").write_text(CARD.format(recipe=recipe, config=model.config, **figures, **versions))
    print(f"perplexities {trained} (untrained {untrained}); {recipe.folder}")


if __name__ == "__main__":
    run_recipe(main, Pretraining())
