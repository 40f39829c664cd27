"""GPT-2 and Llama."""

import peft_tests.test_decoder_models as suite

from inlay import AttentionPrefixConfig, BottleneckConfig, CompositeConfig, PartialConfig, SsfConfig
from peft_suite.cases import base, parts, patch

patch(suite)
WIDE = {"width": 16}  # of two ReLU units, as reduction=16 gives, both would now and then be dead
TASK = {"task_type": "CAUSAL_LM"}
PREFIX, PARALLEL = (
    ("INLAY_ATTENTION_PREFIX", {"length": 3}),
    ("INLAY_BOTTLENECK", {"sites": ["mlp"], "placement": "parallel", **WIDE}),
)
for models in (suite.PEFT_DECODER_MODELS_TO_TEST, suite.SMALL_GRID_MODELS):
    models[:] = [base("GPT2"), base("Llama")]
suite.ALL_CONFIGS[:] = [
    (BottleneckConfig, {**TASK, "target_modules": None, **WIDE}),
    (BottleneckConfig, {**TASK, "sites": ["mlp"], "placement": "parallel", **WIDE, "scale": 4.0}),
    (BottleneckConfig, {**TASK, "activation": None}),
    (AttentionPrefixConfig, {**TASK, "length": 3}),
    (PartialConfig, {**TASK, "last": 1}),
    (PartialConfig, {**TASK, "train": "norm"}),
    (SsfConfig, {**TASK}),
    (CompositeConfig, parts(PREFIX, PARALLEL, **TASK)),
    (CompositeConfig, parts(("LORA", {}), ("INLAY_BOTTLENECK", WIDE), **TASK)),
]

from peft_tests.test_decoder_models import TestDecoderModels  # noqa: E402, F401 - reads the cases above
