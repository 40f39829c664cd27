"""Parameter-efficient fine-tuning of Hugging Face models, with adapters that cannot load wrong."""

import logging
import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.combine import combine
    from inlay.combine.merge import merge
    from inlay.data.images import ImageData, load_images
    from inlay.data.masks import MaskData, load_masks
    from inlay.data.maskview import MaskView
    from inlay.data.picture import ImageView
    from inlay.data.scan import VolumeProcessor
    from inlay.data.text import TextData, load_texts
    from inlay.data.textview import TextView
    from inlay.data.tokens import TextProcessor
    from inlay.data.volumes import VolumeData, load_volumes
    from inlay.data.volumeview import VolumeView
    from inlay.errors import InlayError
    from inlay.infer.bank import Bank
    from inlay.infer.images import predict
    from inlay.infer.masks import predict_masks
    from inlay.infer.session import VolumeSession
    from inlay.infer.text import Decoding, generate, judge
    from inlay.infer.volumes import segment
    from inlay.methods import (
        METHODS,
        AttentionPrefixConfig,
        BottleneckConfig,
        CompositeConfig,
        PartialConfig,
        SpatialAdapterConfig,
        VisualPromptConfig,
    )
    from inlay.models import load_base
    from inlay.processors import load_processor, load_tokenizer
    from inlay.recipe import run_recipe
    from inlay.store.convert import import_adapter
    from inlay.store.file import read_adapter
    from inlay.store.hub import pull_adapter, push_adapter
    from inlay.store.load import load_adapter
    from inlay.store.save import save_adapter
    from inlay.train.config import TrainConfig
    from inlay.train.loop import fit
    from inlay.train.losses import MaskLoss, NextToken

__version__ = "0.1.0"

# Said at every start, and nothing that a user could act on: bitsandbytes, which peft imports, misses the optional
# package `kernels` on CPUs with AVX512-BF16; transformers has renamed gradient checkpointing, which
# peft calls by its old name; peft puts right by itself what it says of GPT-2's transposed weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")

# Importing inlay is cheap; torch and transformers come in with the first of these that is used.
_WHERE = {
    "METHODS": "methods",
    "AttentionPrefixConfig": "methods",
    "Bank": "infer.bank",
    "BottleneckConfig": "methods",
    "CompositeConfig": "methods",
    "Decoding": "infer.text",
    "ImageData": "data.images",
    "ImageView": "data.picture",
    "InlayError": "errors",
    "MaskData": "data.masks",
    "MaskLoss": "train.losses",
    "MaskView": "data.maskview",
    "NextToken": "train.losses",
    "PartialConfig": "methods",
    "SpatialAdapterConfig": "methods",
    "TextData": "data.text",
    "TextProcessor": "data.tokens",
    "TextView": "data.textview",
    "TrainConfig": "train.config",
    "VisualPromptConfig": "methods",
    "VolumeData": "data.volumes",
    "VolumeProcessor": "data.scan",
    "VolumeSession": "infer.session",
    "VolumeView": "data.volumeview",
    "combine": "combine",
    "fit": "train.loop",
    "generate": "infer.text",
    "import_adapter": "store.convert",
    "judge": "infer.text",
    "load_adapter": "store.load",
    "load_base": "models",
    "load_images": "data.images",
    "load_masks": "data.masks",
    "load_processor": "processors",
    "load_texts": "data.text",
    "load_tokenizer": "processors",
    "load_volumes": "data.volumes",
    "merge": "combine.merge",
    "predict": "infer.images",
    "predict_masks": "infer.masks",
    "pull_adapter": "store.hub",
    "push_adapter": "store.hub",
    "read_adapter": "store.file",
    "run_recipe": "recipe",
    "save_adapter": "store.save",
    "segment": "infer.volumes",
}

__all__ = [
    "METHODS",
    "AttentionPrefixConfig",
    "Bank",
    "BottleneckConfig",
    "CompositeConfig",
    "Decoding",
    "ImageData",
    "ImageView",
    "InlayError",
    "MaskData",
    "MaskLoss",
    "MaskView",
    "NextToken",
    "PartialConfig",
    "SpatialAdapterConfig",
    "TextData",
    "TextProcessor",
    "TextView",
    "TrainConfig",
    "VisualPromptConfig",
    "VolumeData",
    "VolumeProcessor",
    "VolumeSession",
    "VolumeView",
    "combine",
    "fit",
    "generate",
    "import_adapter",
    "judge",
    "load_adapter",
    "load_base",
    "load_images",
    "load_masks",
    "load_processor",
    "load_texts",
    "load_tokenizer",
    "load_volumes",
    "merge",
    "predict",
    "predict_masks",
    "pull_adapter",
    "push_adapter",
    "read_adapter",
    "run_recipe",
    "save_adapter",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"inlay.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterPeft:
    """Finds peft once, and makes the methods of this package known to it when its import is done."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("inlay._peft")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


# `import inlay` is enough for PeftModel.from_pretrained to load such an adapter, before or after peft is imported, and
# costs nothing where peft is not needed.
if "peft" in sys.modules:
    import_module("inlay._peft")
else:
    sys.meta_path.insert(0, _AfterPeft())
