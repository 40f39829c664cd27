"""BERT."""

import peft_tests.test_feature_extraction_models as suite

from inlay import AttentionPrefixConfig, BottleneckConfig, CompositeConfig, PartialConfig, SsfConfig
from peft_suite.cases import base, parts, patch

patch(suite)
WIDE = {"width": 16}  # of two ReLU units, as reduction=16 gives, both would now and then be dead
TASK = {"task_type": "FEATURE_EXTRACTION"}
PREFIX, PARALLEL = (
    ("INLAY_ATTENTION_PREFIX", {"length": 3}),
    ("INLAY_BOTTLENECK", {"sites": ["mlp"], "placement": "parallel", **WIDE}),
)
suite.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = [base("Bert")]
suite.ALL_CONFIGS[:] = [
    (BottleneckConfig, {**TASK, "target_modules": None, **WIDE}),
    (BottleneckConfig, {**TASK, "sites": ["mlp"], "placement": "parallel", **WIDE}),
    (BottleneckConfig, {**TASK, "activation": None}),
    (AttentionPrefixConfig, {**TASK, "length": 3}),
    (PartialConfig, {**TASK, "last": 1}),
    (PartialConfig, {**TASK, "train": "bias"}),
    (PartialConfig, {**TASK, "train": "norm"}),
    (SsfConfig, {**TASK}),
    (CompositeConfig, parts(PREFIX, PARALLEL, **TASK)),
    (CompositeConfig, parts(("LORA", {}), ("INLAY_PARTIAL", {"train": "norm"}), **TASK)),
]

from peft_tests.test_feature_extraction_models import (  # noqa: E402, F401 - reads the cases above
    TestPeftFeatureExtractionModel,
)
