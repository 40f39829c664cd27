"""Networks of a few layers, each of a kind that a method has to wrap."""

import peft_tests.test_custom_models as suite

from inlay import BottleneckConfig, CompositeConfig, ConvAdapterConfig, PartialConfig, SsfConfig
from peft_suite.cases import parts, patch

patch(suite)
WIDE = {"width": 16}  # of the width that these sizes give, one or two, all ReLU units would now and then be dead
BOTTLENECKS = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5 modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP 7 linear", "MLP", {"target_modules": ["lin0"], "activation": None, "width": 3}),
    ("MLP 8 norm before", "MLP", {"target_modules": ["lin0"], "layer_norm": "before"}),
    ("MLP 9 norm after, scale", "MLP", {"target_modules": ["lin0"], "layer_norm": "after", "learn_scale": True}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d linear", "Conv2d", {"target_modules": ["conv2d"], "activation": None}),
]
PARTIALS = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5 modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP 6 bias", "MLP", {"target_modules": ["lin0", "lin1"], "train": "bias"}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2dGroups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("LayerNorm", "MLP_LayerNorm", {"target_modules": ["layernorm0"]}),
    ("MHA", "MHA", {"target_modules": ["mha"]}),
]
SCALES = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5 modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2dGroups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("LayerNorm", "MLP_LayerNorm", {"target_modules": ["layernorm0"]}),
]
CONVOLUTIONS = [
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d modules_to_save", "Conv2d", {"target_modules": ["conv2d"], "modules_to_save": ["lin0"]}),
    ("Conv2d behind", "Conv2d", {"target_modules": ["conv2d"], "placement": "conv_sequential"}),
    ("Conv2dGroups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
]
LORA, BOTTLENECK = (("LORA", {"target_modules": ["lin0"]}), ("INLAY_BOTTLENECK", {**WIDE, "target_modules": ["lin0"]}))
PARTIAL = ("INLAY_PARTIAL", {"target_modules": ["lin1"]})
suite.TEST_CASES[:] = [
    *((f"{name} Bottleneck", model, BottleneckConfig, {**WIDE, **settings}) for name, model, settings in BOTTLENECKS),
    *((f"{name} Partial", model, PartialConfig, settings) for name, model, settings in PARTIALS),
    *((f"{name} SSF", model, SsfConfig, settings) for name, model, settings in SCALES),
    *((f"{name} Conv-Adapter", m, ConvAdapterConfig, {**WIDE, **settings}) for name, m, settings in CONVOLUTIONS),
    ("MLP 1 Composite", "MLP", CompositeConfig, parts(LORA, BOTTLENECK)),
    ("MLP 2 Composite", "MLP", CompositeConfig, parts(LORA, PARTIAL)),
    ("MLP 3 Composite modules_to_save", "MLP", CompositeConfig, parts(LORA, BOTTLENECK, modules_to_save=["lin1"])),
]
suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (
        f"{config.__name__} {name}",
        config.__name__.removesuffix("Config").lower(),
        config,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": [target], "init_weights": False},
    )
    for config in (BottleneckConfig, PartialConfig, SsfConfig)
    for name, target in (("Same", "lin0"), ("Different", "lin1"))
]
suite.ALL_PEFT_CONFIG_CLASSES[:] = [BottleneckConfig, PartialConfig, SsfConfig]  # the networks there are linear

from peft_tests.test_custom_models import (  # noqa: E402, F401 - the cases above are read when these are made
    TestMultipleActiveAdapters,
    TestPeftCustomModel,
    TestRequiresGrad,
)
