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
    from inlay.adapters.convert.convert import import_adapter
    from inlay.adapters.convert.networks import import_network
    from inlay.adapters.evaluate import evaluate
    from inlay.adapters.file import read_adapter
    from inlay.adapters.hub.repository import pull_adapter, push_adapter
    from inlay.adapters.load import load_adapter
    from inlay.adapters.precision import set_precision
    from inlay.adapters.save import save_adapter
    from inlay.bases.batch_norm import freeze_statistics
    from inlay.bases.diffusion.sites import pipeline_targets
    from inlay.bases.load import resolve_base
    from inlay.bases.networks.configs import ShuffleNetV1Config, ShuffleNetV2Config, SqueezeNetConfig
    from inlay.bases.processors import load_processor, load_tokenizer
    from inlay.bases.sites import head_modules, lora_targets
    from inlay.cli.recipe import run_recipe
    from inlay.combine import combine
    from inlay.combine.heatmap import write_report
    from inlay.combine.merge import merge
    from inlay.combine.report import overlap
    from inlay.compress.export import export
    from inlay.compress.load import load_exported
    from inlay.compress.prune.carry import carry_adapter
    from inlay.compress.prune.heal import heal
    from inlay.compress.prune.masks import mask_weights
    from inlay.compress.prune.pruning import prune
    from inlay.compress.prune.save import PruneReport, save_pruned
    from inlay.compress.prune.scan import scan_sensitivity
    from inlay.compress.prune.trained import load_trained
    from inlay.compress.quantize import quantize
    from inlay.errors import BadInput, ComputationFailed, DamagedFile, InlayError, Unreachable, Unsupported, WrongBase
    from inlay.methods import (
        METHODS,
        AttentionPrefixConfig,
        BottleneckConfig,
        CompositeConfig,
        ConvAdapterConfig,
        ConvLoraConfig,
        ConvPassConfig,
        PartialConfig,
        SpatialAdapterConfig,
        SsfConfig,
        VisualPromptConfig,
    )
    from inlay.options import option
    from inlay.serve.bank import Bank
    from inlay.study.attach import attach_study
    from inlay.study.compare import compare
    from inlay.study.comparison import Comparison, Row
    from inlay.study.measure import measure_costs
    from inlay.study.problem import Problem
    from inlay.study.report import save_comparison
    from inlay.study.sites import narrow_sites
    from inlay.study.trial import Outcome, Trial
    from inlay.study.tune.budget import parse_budget
    from inlay.study.tune.run import tune
    from inlay.tasks.base import load_base, make_task_options
    from inlay.tasks.images.data import ImageData, load_images
    from inlay.tasks.images.options import ImageTask
    from inlay.tasks.images.predict import draw_sheet, find_pictures, predict
    from inlay.tasks.images.view import ImageView
    from inlay.tasks.masks.data import MaskData, load_masks
    from inlay.tasks.masks.loss import MaskLoss
    from inlay.tasks.masks.options import MaskTask
    from inlay.tasks.masks.predict import predict_masks
    from inlay.tasks.masks.sites import sam_targets
    from inlay.tasks.masks.view import MaskView
    from inlay.tasks.options import describe_run
    from inlay.tasks.sequences.data import SequenceData, load_sequences
    from inlay.tasks.sequences.options import SequenceTask
    from inlay.tasks.sequences.predict import classify_texts
    from inlay.tasks.sequences.processor import SequenceProcessor
    from inlay.tasks.sequences.view import SequenceView
    from inlay.tasks.text.data import TextData, load_texts
    from inlay.tasks.text.generate import Decoding, generate, judge
    from inlay.tasks.text.loss import NextToken
    from inlay.tasks.text.options import TextTask
    from inlay.tasks.text.processor import TextProcessor
    from inlay.tasks.text.view import TextView
    from inlay.tasks.text_to_image.options import TextToImageTask
    from inlay.tasks.text_to_image.paint import Sampling, draw_paintings, paint
    from inlay.tasks.text_to_image.regions import Region, paint_regions
    from inlay.tasks.volumes.data import VolumeData, load_volumes
    from inlay.tasks.volumes.options import VolumeTask
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.score_masks import score_masks
    from inlay.tasks.volumes.segment import segment
    from inlay.tasks.volumes.session import VolumeSession
    from inlay.tasks.volumes.strokes import Stroke
    from inlay.tasks.volumes.view import VolumeView
    from inlay.train.config import TrainConfig
    from inlay.train.loop import fit
    from inlay.train.stream import Stream

__version__ = "0.1.0"

# These messages appear at every start, and a user can do nothing about them:
# - bitsandbytes, which peft imports, misses the optional package `kernels` on CPUs with AVX512-BF16;
# - torchao, which peft imports too, lacks its GPU kernels, and registers enums in a way that torch will drop;
# - diffusers imports image processors, which take Pillow where torchvision is missing, and say so;
# - transformers has renamed gradient checkpointing, and peft still uses the old name;
# - peft warns of GPT-2's transposed weights and then corrects its setting itself.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "falling back to" not in str(record.msg))
logging.getLogger("torchao").addFilter(lambda record: "Failed to load" not in str(record.msg))
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in str(record.msg))
warnings.filterwarnings("ignore", message=r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")

# Importing inlay is cheap: torch and transformers are imported when the first of these names is used.
_MODULE_OF = {
    "METHODS": "methods",
    "AttentionPrefixConfig": "methods",
    "BadInput": "errors",
    "Bank": "serve.bank",
    "BottleneckConfig": "methods",
    "Comparison": "study.comparison",
    "CompositeConfig": "methods",
    "ComputationFailed": "errors",
    "ConvAdapterConfig": "methods",
    "ConvLoraConfig": "methods",
    "ConvPassConfig": "methods",
    "DamagedFile": "errors",
    "Decoding": "tasks.text.generate",
    "ImageData": "tasks.images.data",
    "ImageTask": "tasks.images.options",
    "ImageView": "tasks.images.view",
    "InlayError": "errors",
    "MaskData": "tasks.masks.data",
    "MaskLoss": "tasks.masks.loss",
    "MaskTask": "tasks.masks.options",
    "MaskView": "tasks.masks.view",
    "NextToken": "tasks.text.loss",
    "Outcome": "study.trial",
    "PartialConfig": "methods",
    "Problem": "study.problem",
    "PruneReport": "compress.prune.save",
    "Region": "tasks.text_to_image.regions",
    "Row": "study.comparison",
    "Sampling": "tasks.text_to_image.paint",
    "SequenceData": "tasks.sequences.data",
    "SequenceProcessor": "tasks.sequences.processor",
    "SequenceTask": "tasks.sequences.options",
    "SequenceView": "tasks.sequences.view",
    "ShuffleNetV1Config": "bases.networks.configs",
    "ShuffleNetV2Config": "bases.networks.configs",
    "SpatialAdapterConfig": "methods",
    "SqueezeNetConfig": "bases.networks.configs",
    "SsfConfig": "methods",
    "Stream": "train.stream",
    "Stroke": "tasks.volumes.strokes",
    "TextData": "tasks.text.data",
    "TextProcessor": "tasks.text.processor",
    "TextTask": "tasks.text.options",
    "TextToImageTask": "tasks.text_to_image.options",
    "TextView": "tasks.text.view",
    "TrainConfig": "train.config",
    "Trial": "study.trial",
    "Unreachable": "errors",
    "Unsupported": "errors",
    "VisualPromptConfig": "methods",
    "VolumeData": "tasks.volumes.data",
    "VolumeProcessor": "tasks.volumes.scan",
    "VolumeSession": "tasks.volumes.session",
    "VolumeTask": "tasks.volumes.options",
    "VolumeView": "tasks.volumes.view",
    "WrongBase": "errors",
    "attach_study": "study.attach",
    "carry_adapter": "compress.prune.carry",
    "classify_texts": "tasks.sequences.predict",
    "combine": "combine",
    "compare": "study.compare",
    "describe_run": "tasks.options",
    "draw_paintings": "tasks.text_to_image.paint",
    "draw_sheet": "tasks.images.predict",
    "evaluate": "adapters.evaluate",
    "export": "compress.export",
    "find_pictures": "tasks.images.predict",
    "fit": "train.loop",
    "freeze_statistics": "bases.batch_norm",
    "generate": "tasks.text.generate",
    "head_modules": "bases.sites",
    "heal": "compress.prune.heal",
    "import_adapter": "adapters.convert.convert",
    "import_network": "adapters.convert.networks",
    "judge": "tasks.text.generate",
    "load_adapter": "adapters.load",
    "load_base": "tasks.base",
    "load_exported": "compress.load",
    "load_images": "tasks.images.data",
    "load_masks": "tasks.masks.data",
    "load_processor": "bases.processors",
    "load_sequences": "tasks.sequences.data",
    "load_texts": "tasks.text.data",
    "load_tokenizer": "bases.processors",
    "load_trained": "compress.prune.trained",
    "load_volumes": "tasks.volumes.data",
    "lora_targets": "bases.sites",
    "make_task_options": "tasks.base",
    "mask_weights": "compress.prune.masks",
    "measure_costs": "study.measure",
    "merge": "combine.merge",
    "narrow_sites": "study.sites",
    "option": "options",
    "overlap": "combine.report",
    "paint": "tasks.text_to_image.paint",
    "paint_regions": "tasks.text_to_image.regions",
    "parse_budget": "study.tune.budget",
    "pipeline_targets": "bases.diffusion.sites",
    "predict": "tasks.images.predict",
    "predict_masks": "tasks.masks.predict",
    "prune": "compress.prune.pruning",
    "pull_adapter": "adapters.hub.repository",
    "push_adapter": "adapters.hub.repository",
    "quantize": "compress.quantize",
    "read_adapter": "adapters.file",
    "resolve_base": "bases.load",
    "run_recipe": "cli.recipe",
    "sam_targets": "tasks.masks.sites",
    "save_adapter": "adapters.save",
    "save_comparison": "study.report",
    "save_pruned": "compress.prune.save",
    "scan_sensitivity": "compress.prune.scan",
    "score_masks": "tasks.volumes.score_masks",
    "segment": "tasks.volumes.segment",
    "set_precision": "adapters.precision",
    "tune": "study.tune.run",
    "write_report": "combine.heatmap",
}

__all__ = [
    "METHODS",
    "AttentionPrefixConfig",
    "BadInput",
    "Bank",
    "BottleneckConfig",
    "Comparison",
    "CompositeConfig",
    "ComputationFailed",
    "ConvAdapterConfig",
    "ConvLoraConfig",
    "ConvPassConfig",
    "DamagedFile",
    "Decoding",
    "ImageData",
    "ImageTask",
    "ImageView",
    "InlayError",
    "MaskData",
    "MaskLoss",
    "MaskTask",
    "MaskView",
    "NextToken",
    "Outcome",
    "PartialConfig",
    "Problem",
    "PruneReport",
    "Region",
    "Row",
    "Sampling",
    "SequenceData",
    "SequenceProcessor",
    "SequenceTask",
    "SequenceView",
    "ShuffleNetV1Config",
    "ShuffleNetV2Config",
    "SpatialAdapterConfig",
    "SqueezeNetConfig",
    "SsfConfig",
    "Stream",
    "Stroke",
    "TextData",
    "TextProcessor",
    "TextTask",
    "TextToImageTask",
    "TextView",
    "TrainConfig",
    "Trial",
    "Unreachable",
    "Unsupported",
    "VisualPromptConfig",
    "VolumeData",
    "VolumeProcessor",
    "VolumeSession",
    "VolumeTask",
    "VolumeView",
    "WrongBase",
    "attach_study",
    "carry_adapter",
    "classify_texts",
    "combine",
    "compare",
    "describe_run",
    "draw_paintings",
    "draw_sheet",
    "evaluate",
    "export",
    "find_pictures",
    "fit",
    "freeze_statistics",
    "generate",
    "head_modules",
    "heal",
    "import_adapter",
    "import_network",
    "judge",
    "load_adapter",
    "load_base",
    "load_exported",
    "load_images",
    "load_masks",
    "load_processor",
    "load_sequences",
    "load_texts",
    "load_tokenizer",
    "load_trained",
    "load_volumes",
    "lora_targets",
    "make_task_options",
    "mask_weights",
    "measure_costs",
    "merge",
    "narrow_sites",
    "option",
    "overlap",
    "paint",
    "paint_regions",
    "parse_budget",
    "pipeline_targets",
    "predict",
    "predict_masks",
    "prune",
    "pull_adapter",
    "push_adapter",
    "quantize",
    "read_adapter",
    "resolve_base",
    "run_recipe",
    "sam_targets",
    "save_adapter",
    "save_comparison",
    "save_pruned",
    "scan_sensitivity",
    "score_masks",
    "segment",
    "set_precision",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"inlay.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'inlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# After `import inlay`, PeftModel.from_pretrained loads adapters of its methods and the auto classes load its networks,
# whether these modules were imported before or after. Where they are not needed this costs nothing.
_REGISTERS_WITH = {
    "peft": ["inlay.methods"],
    "transformers.models.auto.configuration_auto": ["inlay.bases.networks.configs", "inlay.bases.diffusion.config"],
    "transformers.models.auto.modeling_auto": [
        "inlay.bases.networks.models",
        "inlay.bases.pruned_configs",
        "inlay.bases.diffusion.model",
    ],
}


class _RegisterAfterImport:
    """An import finder that imports modules of _REGISTERS_WITH as soon as the one that they need has been imported."""

    def __init__(self) -> None:
        self.waiting = {name: ours for name, ours in _REGISTERS_WITH.items() if name not in sys.modules}

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        waiting = self.waiting.pop(name, None)
        spec = find_spec(name) if waiting else None
        if waiting is None or spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            for ours in waiting:
                import_module(ours)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _RegisterAfterImport())
for _name, _ours in _REGISTERS_WITH.items():
    if _name in sys.modules:
        for _module in _ours:
            import_module(_module)
