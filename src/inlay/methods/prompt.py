"""Prompt tuning and prefix tuning for language models, as peft has them: one table of tokens for the whole model.

Lester et al. 2021, arXiv:2104.08691: tokens in front of the text. Li & Liang 2021, arXiv:2101.00190: keys and values in
the cache of every block. Neither wraps a module; visual_prompt.py and attention_prefix.py do.
"""

from peft import PeftType, PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from inlay.errors import Unsupported
from inlay.methods._peft import PeftModel
from inlay.methods.method import Method, writes_text
from inlay.peft_types import PEFT_TYPES

EMBEDDED_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)


def _task_type(model: nn.Module) -> str:
    return "CAUSAL_LM" if writes_text(model) else "SEQ_CLS"


def check_prompt(model: nn.Module) -> None:
    """Refuse a learned prompt on a model that finds the end of a text by its tokens: peft hands it embeddings.

    Args:
        model: A base that is to get a prompt, or a PeftModel, however it was built; other methods pass.

    Raises:
        InlayError: A decoder such as GPT-2, or an encoder-decoder such as BART, with a head over whole texts.
    """
    base: nn.Module = model
    if isinstance(model, PeftModel):
        if model.active_peft_config.peft_type not in EMBEDDED_PROMPTS:
            return
        base = model.get_base_model()
    config = getattr(base, "config", None)
    decodes = type(config) in AutoModelForCausalLM._model_mapping and (
        type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_encoder_decoder", False)
    )
    if (decodes or getattr(config, "is_encoder_decoder", False)) and not writes_text(base):
        raise Unsupported(
            f"{type(base).__name__} classifies by the last token of a text, which it does not find behind a learned "
            "prompt in a padded batch: peft hands it embeddings. Use another method, or an encoder such as BERT."
        )


def _prompt_config(model: nn.Module, length: int) -> PromptTuningConfig:
    check_prompt(model)
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
