"""SAM's image encoder: the tests of peft's feature extractors, with images for inputs."""

import peft_tests.test_feature_extraction_models as suite
import torch
from transformers import SamVisionModel

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
suite.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [base("SamVision")]
suite.ALL_CONFIGS[:] = [
    (BottleneckConfig, {"target_modules": None, **WIDE}),
    (BottleneckConfig, {"sites": ["mlp"], "placement": "parallel", **WIDE}),
    (BottleneckConfig, {"activation": None}),
    (VisualPromptConfig, {"length": 3}),
    (AttentionPrefixConfig, {"length": 3}),
    (PartialConfig, {"last": 1}),
    (PartialConfig, {"train": "norm"}),
    (SsfConfig, {}),
    (ConvPassConfig, {"width": 4}),
    (CompositeConfig, parts(PREFIX, PARALLEL)),
]


class TestSam(suite.TestPeftFeatureExtractionModel):
    """The same tests."""

    transformers_class = SamVisionModel

    def prepare_inputs_for_testing(self):
        """Pixels."""
        torch.manual_seed(0)
        return {"pixel_values": torch.randn(2, 3, 64, 64)}
