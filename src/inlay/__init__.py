"""Parameter-efficient fine-tuning of Hugging Face models, with adapters that cannot load wrong."""

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.data.images import ImageData, load_images
    from inlay.data.picture import ImageView
    from inlay.errors import InlayError
    from inlay.infer.images import predict
    from inlay.models import load_base, load_processor
    from inlay.recipe import run_recipe
    from inlay.store.file import read_adapter
    from inlay.store.load import load_adapter
    from inlay.store.save import save_adapter
    from inlay.train.config import TrainConfig
    from inlay.train.loop import fit

__version__ = "0.1.0"

# Said at every start, and nothing that a user could act on: bitsandbytes, which peft imports, misses the optional
# package `kernels` on CPUs with AVX512-BF16; peft asks transformers for an attribute under its old name.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

# Importing inlay is cheap; torch and transformers come in with the first of these that is used.
_WHERE = {
    "ImageData": "data.images",
    "ImageView": "data.picture",
    "InlayError": "errors",
    "TrainConfig": "train.config",
    "fit": "train.loop",
    "load_adapter": "store.load",
    "load_base": "models",
    "load_images": "data.images",
    "load_processor": "models",
    "predict": "infer.images",
    "read_adapter": "store.file",
    "run_recipe": "recipe",
    "save_adapter": "store.save",
}

__all__ = [
    "ImageData",
    "ImageView",
    "InlayError",
    "TrainConfig",
    "fit",
    "load_adapter",
    "load_base",
    "load_images",
    "load_processor",
    "predict",
    "read_adapter",
    "run_recipe",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"inlay.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
