"""Prompt tuning and prefix tuning for language models, as peft has them: one table of tokens for the whole model.

Lester et al. 2021, arXiv:2104.08691: tokens in front of the text. Li & Liang 2021, arXiv:2101.00190: keys and values in
the cache of every block. Neither wraps a module; visual_prompt.py and attention_prefix.py do.
"""

from peft import PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from inlay.errors import Unsupported
from inlay.methods.method import Method, writes_text
from inlay.peft_types import PEFT_TYPES


def _task_type(model: nn.Module) -> str:
    return "CAUSAL_LM" if writes_text(model) else "SEQ_CLS"


def _reads_last_token(model: nn.Module) -> bool:
    """True for a decoder with a head over whole texts, such as GPT2ForSequenceClassification."""
    kind = type(getattr(model, "config", None))
    decodes = kind in AutoModelForCausalLM._model_mapping and kind not in AutoModelForMaskedLM._model_mapping
    return decodes and not writes_text(model)


def _prompt_config(model: nn.Module, length: int) -> PromptTuningConfig:
    if _reads_last_token(model):
        raise Unsupported(
            f"{type(model).__name__} classifies by the last token of a text, which it does not find behind a learned "
            "prompt in a padded batch: peft hands it embeddings. Use another method, or an encoder such as BERT."
        )
    return PromptTuningConfig(task_type=_task_type(model), num_virtual_tokens=length)


def _prefix_config(model: nn.Module, length: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=_task_type(model), num_virtual_tokens=length)


PROMPT = Method(
    name="prompt",
    paper=PEFT_TYPES["PROMPT_TUNING"].paper,
    attaches="input embeddings",
    width="prompt length",
    merges=False,
    learning_rate=3e-2,
    config=_prompt_config,
    bases=("text",),
)
PREFIX = Method(
    name="prefix",
    paper=PEFT_TYPES["PREFIX_TUNING"].paper,
    attaches="the cache of keys and values",
    width="prefix length",
    merges=False,
    learning_rate=1e-2,
    config=_prefix_config,
    bases=("text",),
)
ROWS = (PROMPT, PREFIX)
