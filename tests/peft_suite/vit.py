"""ViT: the tests of peft's feature extractors, with images for inputs."""

import peft_tests.test_feature_extraction_models as suite
import torch
from transformers import AutoModelForImageClassification

from inlay import (
    AttentionPrefixConfig,
    BottleneckConfig,
    CompositeConfig,
    ConvPassConfig,
    PartialConfig,
    SsfConfig,
    VisualPromptConfig,
)
from peft_suite.cases import base, parts, patch

patch(suite)
WIDE = {"width": 16}  # of two ReLU units, as reduction=16 gives, both would now and then be dead
PREFIX, PARALLEL = (
    ("INLAY_ATTENTION_PREFIX", {"length": 3}),
    ("INLAY_BOTTLENECK", {"sites": ["mlp"], "placement": "parallel", **WIDE}),
)
LORA, PROMPT = ("LORA", {"target_modules": ["q_proj", "v_proj"]}), ("INLAY_VISUAL_PROMPT", {"length": 3})
suite.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [base("ViT")]
suite.ALL_CONFIGS[:] = [
    (BottleneckConfig, {"target_modules": None, **WIDE}),
    (BottleneckConfig, {"sites": ["mlp"], "placement": "parallel", **WIDE}),
    (BottleneckConfig, {"activation": None}),
    (VisualPromptConfig, {"length": 3}),
    (VisualPromptConfig, {"length": 3, "deep": False}),
    (AttentionPrefixConfig, {"length": 3}),
    (PartialConfig, {"last": 1}),
    (PartialConfig, {"train": "bias"}),
    (CompositeConfig, parts(LORA, PROMPT)),
    (SsfConfig, {}),
    (ConvPassConfig, {"width": 4}),
    (CompositeConfig, parts(PREFIX, PARALLEL)),
]


class TestViT(suite.TestPeftFeatureExtractionModel):
    """The same tests."""

    transformers_class = AutoModelForImageClassification

    def prepare_inputs_for_testing(self):
        """Pixels."""
        torch.manual_seed(0)
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
