"""The 3D spatial adapter: SAM, pre-trained on images, as a segmenter of volumes.

    get_peft_model(SamModel.from_pretrained(...), SpatialAdapterConfig(classes=["tumour"]))

In each block of SAM's frozen encoder one adapter of width m adds to the tokens x of a volume, of size C,

    x <- x + W_up · f(K ∗ (W_down · x) + b) + b_up              W_down: (m, C); K: depth-wise 3x3x3; W_up: (C, m)

so that a slice sees its neighbours; attention runs in 3D windows with relative positions over depth too. Trained with
it are a depth-wise filter and positions over depth behind SAM's patches, its norms, necks, and a decoder for
volumes (decoder.py). Images pass as if there were no adapter.

Source: Gong et al. 2023 (3DSAM-adapter), arXiv:2306.13465. `reference=True` is the encoder of the published code; the
default starts from zero, has one activation, and hears clicks with their labels and places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Sam2VisionModel, SamModel
from transformers.activations import ACT2FN
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamVisionEncoder, SamVisionEncoderOutput
from typing_extensions import override

from inlay.bases.sites import Sites
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import BaseTunerLayer, PeftType, register_method, undo_layer_changes
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.method import Method
from inlay.methods.spatial.decoder import Encoded, PromptTensors, VolumeDecoder
from inlay.methods.spatial.encoder import EncoderParts
from inlay.methods.spatial.sam import NEEDS_ADAPTER, VolumeSamModel
from inlay.peft_types import PEFT_TYPES

NEEDS_SAM = (
    "the 3D spatial adapter needs an encoder whose blocks all see one grid of tokens, but SAM 2's pools its tokens at "
    "each stage; take a SAM for scans."
)


@dataclass
class SpatialAdapterConfig(AdapterConfig):
    """Settings of the 3D spatial adapter. A token is patch_depth / enlarge_depth slices deep, patch / enlarge wide."""

    classes: list[str] = field(
        default_factory=lambda: ["object"], metadata={"help": "Names of what is segmented, without the background."}
    )
    channels: list[str] | None = field(
        default=None, metadata={"help": "Names of a scan's channels, in their order, where it has several; None: one."}
    )
    width: int | None = field(default=None, metadata={"help": "Bottleneck size; default: hidden size / reduction."})
    reduction: float = field(default=4.0, metadata={"help": "Hidden size / bottleneck size, where width is not given."})
    kernel: int = field(default=3, metadata={"help": "Edge of the depth-wise convolution; 1: none."})
    position: Literal["before", "after"] = field(
        default="before", metadata={"help": "Before the attention of a block, or after it."}
    )
    activation: str = field(default="gelu", metadata={"help": "Non-linearity, by its name in transformers."})
    window: int = field(default=8, metadata={"help": "Edge of the windows of attention, in tokens; 0: global."})
    shift: bool = field(default=True, metadata={"help": "Shift the windows by half in every other block."})
    enlarge: int = field(default=4, metadata={"help": "Enlarge slices so many times before SAM's patches are cut."})
    enlarge_depth: int = field(default=4, metadata={"help": "The same across slices."})
    patch_depth: int = field(default=16, metadata={"help": "Slices of the enlarged volume that make one token."})
    depth_rows: int = field(default=32, metadata={"help": "Rows of the table of positions over depth."})
    train_norms: bool = field(default=True, metadata={"help": "Train SAM's layer norms too, as a difference."})
    levels: int = field(default=4, metadata={"help": "After how many of the blocks the decoder gets features."})
    decoder_width: int = field(default=64, metadata={"help": "Features inside the decoder."})
    prompts: bool = field(default=True, metadata={"help": "False: a segmenter that takes no clicks and boxes."})
    rounds: int = field(default=2, metadata={"help": "Answers to simulated clicks that a training step learns from."})
    simulated: Literal["errors", "mixed"] = field(
        default="errors",
        metadata={
            "help": "Prompts of training: clicks in classes and errors; mixed: at centres too, and masks to mend."
        },
    )
    reference: bool = field(default=False, metadata={"help": "The encoder as it was published."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_SPATIAL3D"]
        if self.reference:
            self.reduction, self.activation, self.position, self.kernel = 2.0, "relu", "before", 3
        if isinstance(self.classes, str) or not self.classes or len(set(self.classes)) < len(self.classes):
            raise BadInput(f"classes must be a list of different names, without the background, got {self.classes!r}.")
        if self.channels is not None and (
            isinstance(self.channels, str) or len(self.channels) < 2 or len(set(self.channels)) < len(self.channels)
        ):
            raise BadInput(f"channels must be a list of two or more different names, or None, got {self.channels!r}.")
        least = {"window": 0, "enlarge": 1, "enlarge_depth": 1, "patch_depth": 1, "depth_rows": 1, "levels": 1}
        least |= {"decoder_width": 8, "rounds": 0} | ({} if self.width is None else {"width": 1})
        for name, low in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise BadInput(f"{name} must be a whole number of at least {low}, got {getattr(self, name)!r}.")
        if not self.reduction > 0:
            raise BadInput(f"reduction must be positive, got {self.reduction}.")
        if self.prompts and self.rounds == 0:
            raise BadInput("rounds must be at least 1 where clicks are to be learned; else set prompts=False.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadInput(f"kernel must be odd, got {self.kernel}.")
        self._check_choices()
        if self.activation not in ACT2FN:
            raise BadInput(f"activation must be one of {', '.join(sorted(ACT2FN))}, got {self.activation!r}.")
        if self.patch_depth % self.enlarge_depth:
            raise BadInput(
                f"patch_depth must be a multiple of enlarge_depth, got {self.patch_depth} and {self.enlarge_depth}."
            )

    @property
    def channel_count(self) -> int:
        """Channels of a scan."""
        return len(self.channels or [""])

    @override
    def to_dict(self) -> dict[str, Any]:
        """As peft's, without `channels` where there is one: such files are as they were before there could be more."""
        settings = super().to_dict()
        return settings if self.channels else {key: value for key, value in settings.items() if key != "channels"}

    def _check_choices(self) -> None:
        for name, known in (("position", ("before", "after")), ("simulated", ("errors", "mixed"))):
            if getattr(self, name) not in known:
                raise BadInput(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}.")

    @classmethod
    def fitted(
        cls,
        model: nn.Module,
        classes: Sequence[str],
        crop: Sequence[int],
        spacing_mm: Sequence[float] | None = None,
        token: int = 4,
        channels: Sequence[str] = (),
        **settings: Any,
    ) -> "SpatialAdapterConfig":
        """Settings for a SAM and for scans: tokens of `token` voxels, and of fewer slices where these are thick.

        Windows have 8 tokens along an axis as published, or 4 where a crop has fewer than 16: less of them is padding.

        Args:
            model: A SamModel or SamVisionModel, for the size of its patches.
            classes: Names of what is segmented, without the background.
            crop: Voxels (D, H, W) that the model will see at a time.
            spacing_mm: Of the voxels, (D, H, W); default: cubes.
            token: Edge of a token in a slice, in voxels; a power of two that divides SAM's patch.
            channels: Names of a scan's channels, in their order; fewer than two: it has one.
            settings: Further fields.

        Raises:
            InlayError: `token` does not divide the patch; a SAM 2.
        """
        config: Any = model.config
        patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
        if patch is None:
            raise Unsupported(NEEDS_SAM)
        if token < 1 or patch % token:
            raise BadInput(f"a token must be as long as a divisor of SAM's patch of {patch} pixels, got {token}.")
        thick = spacing_mm[0] / max(spacing_mm[1:]) if spacing_mm else 1.0
        slices = token
        while slices > 1 and slices % 2 == 0 and slices * thick > 1.5 * token:
            slices //= 2
        tokens = [-(-size // step) for size, step in zip(crop, (slices, token, token), strict=True)]
        sizes = {"enlarge": patch // token, "enlarge_depth": patch // slices, "patch_depth": patch}
        fitting = {"depth_rows": tokens[0], "window": 8 if min(tokens) >= 16 else 4}
        named = list(channels) if len(channels) > 1 else None
        return cls(classes=list(classes), channels=named, **{**sizes, **fitting, **settings})


class SpatialLayer(AdapterLayer):
    """What both layers of the method share: one adapter acts at a time, and none folds into a weight."""

    nesting = 5

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return "a 3D spatial adapter does not fold into SAM's weights: it takes volumes where SAM takes images."

    def only_adapter(self, names: Sequence[str]) -> str:
        """The adapter that acts."""
        if len(names) != 1:
            raise BadInput(
                f"a volume takes one 3D spatial adapter at a time, {', '.join(names) or 'none'} "
                f"{'act' if names else 'is active'}; use set_adapter, or combine them into one."
            )
        return names[0]


class SpatialEncoderLayer(SpatialLayer):
    """Wraps a SamVisionEncoder, which then takes volumes too.

    Attributes:
        inlay_spatial3d_encoder: By adapter, what is trained inside.
    """

    adapter_layer_names = ("inlay_spatial3d_encoder",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_spatial3d_encoder = nn.ModuleDict()

    @override
    def add(self, name: str, config: SpatialAdapterConfig, tuner: AdapterTuner, key: str) -> None:
        encoder = self.get_base_layer()
        patch = encoder.patch_embed.projection.kernel_size[0]
        if patch % config.enlarge:
            raise BadInput(f"enlarge must divide SAM's patch of {patch}, got {config.enlarge}.")
        self.inlay_spatial3d_encoder[name] = EncoderParts(encoder, config)
        self.options[name] = config

    def stride(self, name: str) -> tuple[int, int, int]:
        """Voxels of a token along D, H and W."""
        config = self.options[name]
        edge = self.get_base_layer().patch_embed.projection.kernel_size[0] // config.enlarge
        return config.patch_depth // config.enlarge_depth, edge, edge

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pixel_values = args[0] if args else kwargs["pixel_values"]
        if pixel_values.ndim == 5:
            if self.disable_adapters:
                raise Unsupported(NEEDS_ADAPTER)
            return super().forward(pixel_values)
        kwargs.pop("adapter_names", None)
        return self.base_layer(*args, **kwargs)

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        levels = self.by_rows(groups, self._levels, args[0])
        return SamVisionEncoderOutput(last_hidden_state=levels[-1], hidden_states=levels)

    def _levels(self, names: list[str], volume: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Levels (B, E, D', H', W') of volumes (B, n, D, H, W), their last planes repeated to fill the last tokens."""
        name, encoder = self.only_adapter(names), self.get_base_layer()
        for block in encoder.layers:
            if isinstance(block, BaseTunerLayer) or isinstance(block.attn, BaseTunerLayer):
                raise Unsupported("visual prompts and attention prefixes do not work on volumes; leave them out.")
        d, h, w = ((-size) % step for size, step in zip(volume.shape[2:], self.stride(name), strict=True))
        volume = F.pad(volume, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else volume
        return self.inlay_spatial3d_encoder[name](volume, encoder)


class SpatialDecoderLayer(SpatialLayer):
    """Wraps a SamMaskDecoder, and holds the decoders for volumes.

    Attributes:
        inlay_spatial3d_decoder: By adapter.
    """

    adapter_layer_names = ("inlay_spatial3d_decoder",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_spatial3d_decoder = nn.ModuleDict()

    @override
    def add(self, name: str, config: SpatialAdapterConfig, tuner: AdapterTuner, key: str) -> None:
        vision = tuner.model.config.vision_config
        levels = min(config.levels, vision.num_hidden_layers)
        self.inlay_spatial3d_decoder[name] = VolumeDecoder(
            vision.output_channels,
            levels,
            config.decoder_width,
            len(config.classes),
            config.prompts,
            inputs=config.channel_count,
        )
        self.options[name] = config

    @override
    def forward(self, *args: Any, volumetric: str | None = None, **kwargs: Any) -> Any:
        if volumetric is not None:
            return super().forward(*args, volumetric=volumetric, **kwargs)
        kwargs.pop("adapter_names", None)
        return self.base_layer(*args, **kwargs)

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        step = self._encode if kwargs.pop("volumetric") == "encode" else self._decode
        return self.by_rows(groups, step, *args, **kwargs)

    def _encode(
        self, names: list[str], volume: torch.Tensor, *levels: torch.Tensor, stride: tuple[int, int, int]
    ) -> Encoded:
        return self.inlay_spatial3d_decoder[self.only_adapter(names)].encode(levels, volume, stride)

    def _decode(self, names: list[str], *encoded: torch.Tensor, stride: tuple[int, int, int], **prompts: Any) -> Any:
        return self.inlay_spatial3d_decoder[self.only_adapter(names)](
            Encoded(*encoded), PromptTensors(**prompts), stride
        )


class SpatialModel(AdapterTuner):
    """The tuner of SpatialAdapterConfig."""

    prefix = "inlay_spatial3d_"
    tuner_layer_cls = SpatialLayer

    @override
    def targets(self, config: SpatialAdapterConfig, found: Sites) -> Sequence[str]:
        if any(isinstance(module, Sam2VisionModel) for module in self.model.modules()):
            raise Unsupported(NEEDS_SAM)
        kinds = (SamVisionEncoder, SamMaskDecoder, SpatialLayer)
        return [name for name, module in self.model.named_children() if isinstance(module, kinds)]

    @override
    def layer_class(self, target: nn.Module) -> type[AdapterLayer]:
        if isinstance(target, SamVisionEncoder):
            return SpatialEncoderLayer
        if isinstance(target, SamMaskDecoder):
            return SpatialDecoderLayer
        raise Unsupported(
            f"a 3D spatial adapter goes into a SamModel or SamVisionModel, got a {type(target).__name__}; leave "
            "target_modules out."
        )

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if type(model) is SamModel:
            model.__class__ = VolumeSamModel

    @override
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        undo_layer_changes(model)
        return model


register_method("inlay_spatial3d", SpatialAdapterConfig, SpatialModel)

SPATIAL = Method(
    name="spatial",
    paper=PEFT_TYPES["INLAY_SPATIAL3D"].paper,
    attaches="SAM's encoder, for volumes",
    width="bottleneck size",
    merges=False,
    kind="adapter",
    learning_rate=1e-3,
    config=lambda model, width: SpatialAdapterConfig(width=width),
    bases=("volume",),
)
ROWS = (SPATIAL,)
