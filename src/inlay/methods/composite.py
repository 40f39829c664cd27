"""Several methods in one adapter: trained together, saved in one file, switched and deleted as one.

    CompositeConfig(parts=[LoraConfig(...), VisualPromptConfig(...)])
    CompositeConfig(parts=[AttentionPrefixConfig(), BottleneckConfig(sites=["mlp"], placement="parallel", scale=4)])

The second is the mix-and-match adapter of He et al. 2021, arXiv:2110.04366, section 4.6. Where two methods meet at one
module they are nested in a fixed order, whatever the order of the parts: partial fine-tuning changes the weight itself,
peft's methods come next, then prefix, bottleneck and prompts.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn
from typing_extensions import override

from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    BaseTunerLayer,
    PeftType,
    get_peft_config,
    layers_taken_out,
    name_import_in_card,
    register_method,
    set_additional_trainable_modules,
)
from inlay.methods.attention_prefix import ATTENTION_PREFIX, AttentionPrefixModel
from inlay.methods.base import AdapterTuner, others_train_as_before
from inlay.methods.bottleneck import SCALED_PARALLEL
from inlay.methods.lora import LORA
from inlay.methods.method import Method
from inlay.methods.visual_prompt import DEEP


@dataclass
class CompositeConfig(PeftConfig):
    """The configs of the methods that make one adapter."""

    parts: list[Any] = field(default_factory=list, metadata={"help": "Configs of two or more different methods."})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained whole and saved with the adapter, such as a new head."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_COMPOSITE"]
        self.parts = [get_peft_config(dict(part)) if isinstance(part, dict) else part for part in self.parts]
        kinds = [part.peft_type for part in self.parts]
        if len(set(kinds)) != len(kinds) or len(kinds) < 2:
            raise BadInput(
                f"a composite has two parts or more, each of another method; got {[str(k.value) for k in kinds]}."
            )
        for part in self.parts:
            if part.is_prompt_learning or part.peft_type == self.peft_type:
                raise Unsupported(
                    f"{part.peft_type.value} cannot be a part: it does not wrap modules; use VisualPromptConfig or "
                    "AttentionPrefixConfig for prompts and prefixes."
                )
            if getattr(part, "modules_to_save", None) or getattr(part, "bias", "none") != "none":
                raise BadInput("give modules_to_save to the composite, not to a part, and parts without bias.")

    @override
    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As peft's; the card in that folder then says which import makes the method known."""
        super().save_pretrained(save_directory, **kwargs)
        name_import_in_card(save_directory, self.peft_type.value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into adapter_config.json."""
        plain = {**super().to_dict(), "parts": [part.to_dict() for part in self.parts]}
        for part in plain["parts"]:
            for key, value in part.items():
                if isinstance(value, set):
                    part[key] = sorted(value)
        return plain


class CompositeModel(AdapterTuner):
    """The tuner of CompositeConfig: the parts' own tuners, one after the other."""

    prefix = "inlay_composite_"
    tuner_layer_cls: Any = BaseTunerLayer

    @override
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
    ) -> None:
        self.refuse_transformers("a composite")
        config = self.peft_config[adapter_name]
        with others_train_as_before(model):
            known = vars(model).pop("peft_config", None)
            for part in config.parts:
                part.inference_mode = config.inference_mode
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[part.peft_type]
                with layers_taken_out(model, keep=tuner.tuner_layer_cls):
                    inner = tuner(model, {adapter_name: part}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
                self.targeted_module_names.extend(inner.targeted_module_names)
                del model.peft_config
            if known is not None:
                model.peft_config = known
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(model),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in self.active_adapters,
            )

    # The one part that saves other tensors than it trains; both work on any model.
    _get_adapter_state_dict = AttentionPrefixModel._get_adapter_state_dict
    _remap_adapter_state_dict_for_load = AttentionPrefixModel._remap_adapter_state_dict_for_load


register_method("inlay_composite", CompositeConfig, CompositeModel)


def _without_number(paper: str) -> str:
    """Authors and year."""
    return paper.partition(",")[0]


MIX_AND_MATCH = Method(
    name="mam",
    paper=f"{SCALED_PARALLEL.paper}, section 4.6",
    attaches="attention, and next to the MLP",
    width="prefix length, bottleneck size",
    merges=False,
    kind="composite",
    learning_rate=1e-2,
    config=lambda model, width: CompositeConfig(
        parts=[ATTENTION_PREFIX.config(model, width), SCALED_PARALLEL.config(model, width)]
    ),
)
LORA_PROMPT = Method(
    name="lora-prompt",
    paper=f"{_without_number(LORA.paper)} and {_without_number(DEEP.paper)}",
    attaches="linear layers and every block",
    width="rank r, prompt length",
    merges=False,
    kind="composite",
    learning_rate=3e-3,
    config=lambda model, width: CompositeConfig(parts=[LORA.config(model, width), DEEP.config(model, width)]),
    bases=("vision", "sam"),
)
ROWS = (MIX_AND_MATCH, LORA_PROMPT)
