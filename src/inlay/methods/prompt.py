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
    """Refuse a PeftModel with a learned prompt, however it was built, on a base that `refuse_prompt` refuses.

    Raises:
        InlayError: As there. Other methods, and models without one, pass.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.peft_type in EMBEDDED_PROMPTS:
        refuse_prompt(model.get_base_model())


def refuse_prompt(base: nn.Module) -> None:
    """Refuse a base that finds the end of a text by its tokens: behind a learned prompt peft hands it embeddings.

    Raises:
        InlayError: A decoder such as GPT-2, or an encoder-decoder such as BART, with a head over whole texts.
    """
    config = getattr(base, "config", None)
    both = getattr(config, "is_encoder_decoder", False)
    encodes = type(config) in AutoModelForMaskedLM._model_mapping and not both
    decodes = both or (type(config) in AutoModelForCausalLM._model_mapping and not encodes)
    if decodes and not writes_text(base):
        raise Unsupported(
            f"{type(base).__name__} classifies by the last token of a text, which it does not find behind a learned "
            "prompt in a padded batch: peft hands it embeddings. Use another method, or an encoder such as BERT."
        )


def _prompt_config(model: nn.Module, length: int) -> PromptTuningConfig:
    refuse_prompt(model)
    return PromptTuningConfig(task_type=_task_type(model), num_virtual_tokens=length)


def _prefix_config(model: nn.Module, length: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=_task_type(model), num_virtual_tokens=length)


PROMPT = Method(
    name="prompt",
    paper=PEFT_TYPES["PROMPT_TUNING"].paper,
    attaches="input embeddings",
    width="prompt length",
    merges=False,
    kind="prompt",
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
    kind="prompt",
    learning_rate=1e-2,
    config=_prefix_config,
    bases=("text",),
)
ROWS = (PROMPT, PREFIX)
