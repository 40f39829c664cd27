"""Which of peft's tests run, and those that cannot pass: each with its reason and the error that it gives, strictly.

A plugin of pytest, which `run.py` names: a conftest.py would act on all tests of the project.
"""

import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from inlay import InlayError

try:
    import diffusers  # noqa: F401
except ImportError:  # peft's common tests import it, and no method here needs it
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub

OURS = re.compile(
    "BottleneckConfig|PartialConfig|CompositeConfig|VisualPromptConfig|AttentionPrefixConfig|SsfConfig|ConvPassConfig|"
    "ConvAdapterConfig"
)


@dataclass(frozen=True)
class CannotPass:
    """Tests that fail, and why.

    Attributes:
        reason: In a sentence. "peft assumes": the test takes for granted what is not so of this method. "By design":
            inlay decides otherwise, or refuses in words.
        tests: Pattern of their names, whole.
        raises: What they raise.
        config: The class of the method's settings; any where it is empty.
        model: Pattern found in the name of the model.
        when: Which parameters of the test; all by default.
    """

    reason: str
    tests: str
    raises: type[BaseException]
    config: str = ""
    model: str = ""
    when: Callable[[dict[str, Any]], bool] = lambda given: True

    def holds(self, item: pytest.Function) -> bool:
        """Whether a test is one of them."""
        given = item.callspec.params
        return bool(
            re.fullmatch(self.tests, item.originalname)
            and self.config in ("", getattr(given.get("config_cls"), "__name__", ""))
            and re.search(self.model, given.get("model_id", ""))
            and self.when(given)
        )


_PREFIX = "peft assumes: a method has one prefix, model.prefix; a composite has those of its parts"
_WORDS = "peft assumes: its own words; inlay refuses NaN as well, and always, in other words"
_TRAINING = r"test_training(_decoders|_custom_models)?(_gradient_checkpointing)?"
CANNOT_PASS = [
    CannotPass(_PREFIX, _TRAINING, AssertionError, "CompositeConfig"),
    CannotPass(_PREFIX, "test_only_params_are_updated", AssertionError, "CompositeConfig"),
    CannotPass(_PREFIX, "test_add_adapter_no_autocast_adapter_dtype", ValueError, "CompositeConfig"),
    CannotPass(_WORDS, "test_merge_layers_nan", AssertionError, model="GPT2"),
    CannotPass(
        "peft assumes: inputs have input_ids", "test_prepare_for_training_parametrized", KeyError, model="ViT|SamVision"
    ),
    CannotPass(
        "peft assumes: fewer blocks have fewer tensors; a shallow prompt is one tensor whatever the blocks",
        "test_training_layer_indexing",
        AssertionError,
        "VisualPromptConfig",
        when=lambda given: not given["config_kwargs"].get("deep", True),
    ),
    CannotPass(
        "by design: the last blocks and chosen blocks exclude each other",
        r"test_training(_decoders)?_layer_indexing",
        InlayError,
        "PartialConfig",
        when=lambda given: "last" in given["config_kwargs"],
    ),
    CannotPass(
        "by design: what is merged already is merged again in silence, with equal outputs",
        "test_merge_layers_is_idempotent",
        pytest.fail.Exception,
    ),
    CannotPass(
        "by design: deltas are float32 whatever the base is, as they would be rounded away in bfloat16",
        "test_(adapter_dtype_autocast|add_adapter_no_autocast_adapter_dtype)",
        AssertionError,
        "PartialConfig",
        when=lambda given: given["dtype"] != torch.float32 and not given.get("autocast_adapter_dtype", False),
    ),
    CannotPass(
        "by design: a composite does not come by transformers' own injection, which cannot save it",
        "test_(save_load_roundtrip_direct_injection|load_model_low_cpu_mem_usage)",
        InlayError,
        "CompositeConfig",
        model="MLP",
    ),
    CannotPass(
        "peft assumes: what is wrapped is linear; convolutions, embeddings, norms and attention have no in_features",
        "test_in_features_out_features_exposed",
        AssertionError,
        model="Conv|LayerNorm|MHA",
    ),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out peft's tests of its own methods, and mark those that cannot pass."""
    left = [item for item in items if not OURS.search(item.name)]
    items[:] = [item for item in items if OURS.search(item.name)]
    config.hook.pytest_deselected(items=left)
    for item in items:
        rows = [row for row in CANNOT_PASS if row.holds(item)]
        assert len(rows) < 2, f"{item.nodeid} has {len(rows)} reasons to fail"
        for row in rows:
            item.add_marker(pytest.mark.xfail(reason=row.reason, raises=row.raises, strict=True))
