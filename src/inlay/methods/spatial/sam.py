"""SAM with a 3D spatial adapter in it: volumes and prompts in, scores of every voxel out; and how it is taught.

VolumeSamModel        what the class of a SamModel becomes while the adapter is in it
dice_cross_entropy    the loss
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import SamModel
from transformers.utils import ModelOutput
from typing_extensions import override

from inlay.errors import BadInput, Unsupported
from inlay.methods.base import AdapterLayer
from inlay.methods.spatial.decoder import Encoded, PromptTensors
from inlay.methods.spatial.prompts import (
    boxes_around,
    clicks_at_centres,
    clicks_in_objects,
    clicks_on_errors,
    damage_masks,
)

PIECE = 2**21  # logits of which the loss is computed at a time
CERTAIN = 10.0  # logit of a mask's class where the others have 0: probabilities of 0.9999 and less than 0.0001
FIRST = ("box", "mask", "objects", "clicks")  # what a simulated user begins with,
SHARES = (0.25, 0.1, 0.3, 0.35)  # and in how many of the steps
NEEDS_ADAPTER = "SAM by itself takes images; a volume needs an active 3D spatial adapter."


@dataclass
class VolumeOutput(ModelOutput):
    """What the adapted SAM gives for volumes.

    Attributes:
        loss: Dice and cross-entropy, where labels were given.
        logits: (B, K + 1, D, H, W); channel 0 is the background.
        image_embeddings: Given back instead of `pixel_values`, they save the encoder for another prompt.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    image_embeddings: Any = None


class VolumeSamModel(SamModel):
    """A SamModel whose `forward` takes volumes too: what the class of an adapted SamModel becomes."""

    @override
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: Any = None,
        labels: torch.Tensor | None = None,
        input_box_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Segment volumes; images (B, C, H, W) go to SamModel.

        Args:
            pixel_values: (B, n, D, H, W), normalised, of any size; n are the channels that the adapter was made for.
            input_points: (B, N, 3), voxel indices (d, h, w).
            input_labels: (B, N): the class at each point, 0 for background, -1 for no point; default: 1.
            input_boxes: (B, M, 6), two opposite corners (d, h, w, d, h, w).
            input_masks: What is to be mended: the logits of an earlier answer (B, K + 1, D, H, W), or a mask
                (B, D, H, W) of classes 0 to K, in whole numbers.
            image_embeddings: Of an earlier output, in place of pixel_values.
            labels: (B, D, H, W), -1 to be ignored. In train mode clicks are simulated, unless prompts are given.
            input_box_labels: (B, M): the class in each box, -1 for no box; default: 1.
            kwargs: What SamModel takes for images.
        """
        if isinstance(image_embeddings, Encoded | tuple):
            encoded = Encoded(*image_embeddings)
        elif pixel_values is not None and pixel_values.ndim == 5:
            encoded = self._encode(pixel_values)
        else:
            return super().forward(
                pixel_values, input_points, input_labels, input_boxes, input_masks, image_embeddings, **kwargs
            )
        prompts = self._check_prompts(input_points, input_labels, input_boxes, input_box_labels, input_masks)
        if labels is not None and self.training and not any(value is not None for value in prompts):
            return self._train_by_clicks(encoded, labels)
        logits = self._decode(encoded, prompts)
        loss = None if labels is None else dice_cross_entropy(logits, labels)
        return VolumeOutput(loss=loss, logits=logits, image_embeddings=encoded)

    def _encode(self, volume: torch.Tensor) -> Encoded:
        encoder: Any = self.vision_encoder
        name = self._active_adapter()
        stride, config = encoder.stride(name), encoder.options[name]
        if volume.shape[1] != config.channel_count:
            named = (
                f"{config.channel_count} channels, {', '.join(config.channels)}" if config.channels else "one channel"
            )
            raise BadInput(
                f"a volume of this adapter has {named}, (B, {config.channel_count}, D, H, W); this one is "
                f"{tuple(volume.shape)}."
            )
        levels = encoder(volume).hidden_states
        return Encoded(*self.mask_decoder(volume, *levels, volumetric="encode", stride=stride))

    def _decode(self, encoded: Encoded, prompts: PromptTensors) -> torch.Tensor:
        encoder: Any = self.vision_encoder
        stride = encoder.stride(self._active_adapter())
        return self.mask_decoder(*encoded, volumetric="decode", stride=stride, **prompts._asdict())

    def _active_adapter(self) -> str:
        """The adapter whose settings count; an error where none acts."""
        encoder: Any = self.vision_encoder
        if not isinstance(encoder, AdapterLayer) or encoder.disable_adapters:
            raise Unsupported(NEEDS_ADAPTER)
        return encoder.only_adapter([name for name in encoder.active_adapters if name in encoder.options])

    def _check_prompts(
        self,
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        box_labels: torch.Tensor | None,
        previous: torch.Tensor | None,
    ) -> PromptTensors:
        encoder: Any = self.vision_encoder
        config = encoder.options[self._active_adapter()]
        given = {"points": (points, labels, 3, 0), "boxes": (boxes, box_labels, 6, 1)}
        said: dict[str, torch.Tensor | None] = {}
        for what, (where, names, size, least) in given.items():
            if where is None:
                said[what] = None
                continue
            if not config.prompts:
                raise BadInput(f"this adapter takes no {what}; train one with prompts=True.")
            if where.ndim != 3 or where.shape[-1] != size:
                raise BadInput(f"{what} have the shape (B, N, {size}); these are {tuple(where.shape)}.")
            names = torch.ones_like(where[..., 0], dtype=torch.long) if names is None else names.long()
            wrong = (names >= 0) & ((names < least) | (names > len(config.classes)))
            if names.shape != where.shape[:2] or bool(wrong.any()):
                raise BadInput(
                    f"labels of {what} are -1 or {least} to {len(config.classes)} and have the shape "
                    f"{tuple(where.shape[:2])}; these are {names.flatten().tolist()[:8]}, {tuple(names.shape)}."
                )
            said[what] = where
            said["labels" if what == "points" else "box_labels"] = names
        return PromptTensors(**said, previous=self._check_previous(previous))

    def _check_previous(self, previous: torch.Tensor | None) -> torch.Tensor | None:
        """Logits of what is to be mended."""
        encoder: Any = self.vision_encoder
        config = encoder.options[self._active_adapter()]
        if previous is None:
            return None
        if not config.prompts:
            raise BadInput("this adapter takes no masks; train one with prompts=True.")
        if previous.ndim == 5:
            return previous
        if previous.ndim != 4 or previous.is_floating_point():
            raise BadInput(
                "input_masks are whole numbers (B, D, H, W) or logits (B, K + 1, D, H, W); these are "
                f"{previous.dtype}, {tuple(previous.shape)}."
            )
        return mask_logits(previous, len(config.classes))

    def _train_by_clicks(self, encoded: Encoded, labels: torch.Tensor) -> VolumeOutput:
        """An answer without prompts, then `rounds` more, each after further prompts; the loss is their mean."""
        encoder: Any = self.vision_encoder
        config = encoder.options[self._active_adapter()]
        draw = draw_mixed_prompts if config.simulated == "mixed" else draw_prompts
        first = logits = self._decode(encoded, PromptTensors())
        losses, prompts = [dice_cross_entropy(logits, labels)], PromptTensors()
        for i in range(config.rounds if config.prompts else 0):
            prompts = draw(prompts, logits.detach(), labels, begins=i == 0)
            logits = self._decode(encoded, prompts)
            losses.append(dice_cross_entropy(logits, labels))
        return VolumeOutput(loss=torch.stack(losses).mean(), logits=first, image_embeddings=encoded)

    def undo_changes(self) -> None:
        """Be a SamModel again."""
        self.__class__ = SamModel


def draw_prompts(prompts: PromptTensors, answer: torch.Tensor, labels: torch.Tensor, begins: bool) -> PromptTensors:
    """The prompts so far and further ones: at first a box or clicks in the classes, later clicks at the densest errors.

    Of the first ones one in four is a box. The answer is handed on too, with the first ones only in half of the steps,
    as a click may begin or mend.

    Args:
        prompts: So far.
        answer: Logits to them, (B, K + 1, D, H, W).
        labels: (B, D, H, W), -1 to be ignored.
        begins: There are none so far.
    """
    classes = answer.shape[1] - 1
    if begins and torch.rand(()) < 0.25:
        boxes, named = boxes_around(labels, classes)
        prompts = prompts._replace(boxes=boxes, box_labels=named)
    else:
        count = _draw_count()
        found = clicks_in_objects(labels, count, classes) if begins else clicks_on_errors(answer, labels, count)
        prompts = _add_clicks(prompts, *found)
    return prompts._replace(previous=answer if not begins or torch.rand(()) < 0.5 else None)


def draw_mixed_prompts(
    prompts: PromptTensors, answer: torch.Tensor, labels: torch.Tensor, begins: bool
) -> PromptTensors:
    """As `draw_prompts`, with clicks at the centres of the largest errors too, and with masks to mend.

    What the prompts mend is the answer before as it is, the mask that a user sees of it, or at first sometimes a mask
    from elsewhere, which is wrong in other ways. The first prompts may also be nothing but such a mask, or clicks at
    errors.
    """
    classes, previous = answer.shape[1] - 1, answer
    if torch.rand(()) < 0.5:
        mask = damage_masks(labels, classes) if begins and torch.rand(()) < 0.5 else answer.argmax(1)
        previous = mask_logits(mask, classes).to(answer)
    kind = FIRST[int(torch.multinomial(torch.tensor(SHARES), 1))] if begins else "clicks"
    if kind == "box":
        boxes, named = boxes_around(labels, classes)
        prompts = prompts._replace(boxes=boxes, box_labels=named)
    elif kind == "objects":
        prompts = _add_clicks(prompts, *clicks_in_objects(labels, _draw_count(), classes))
    elif kind == "clicks":
        simulate = clicks_on_errors if torch.rand(()) < 0.5 else clicks_at_centres
        prompts = _add_clicks(prompts, *simulate(previous, labels, _draw_count()))
    alone = begins and kind != "mask" and bool(torch.rand(()) < 0.5)
    return prompts._replace(previous=None if alone else previous)


def _draw_count() -> int:
    """1 to 11, fewer more often."""
    return int(2 ** (torch.rand(()) * 3.5))


def _add_clicks(prompts: PromptTensors, points: torch.Tensor, labels: torch.Tensor) -> PromptTensors:
    if prompts.points is not None and prompts.labels is not None:
        points, labels = torch.cat([prompts.points, points], 1), torch.cat([prompts.labels, labels], 1)
    return prompts._replace(points=points, labels=labels)


def mask_logits(mask: torch.Tensor, classes: int) -> torch.Tensor:
    """Logits (B, K + 1, D, H, W) of an answer that is sure of a mask (B, D, H, W) of classes 0 to K."""
    numbers = torch.arange(classes + 1, device=mask.device)
    return (mask[:, None] == numbers[:, None, None, None]) * CERTAIN


def dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of the soft Dice loss, over rows and classes with the background left out, and of the cross-entropy.

    In the cross-entropy a voxel counts by (voxels of the batch / voxels of its class) ** ((1 - d) / 2), where d is the
    soft Dice of its class in the batch. So a class that is not found yet counts by the square root of its voxels, and
    the background does not outweigh many small ones; one that is found counts as in the plain cross-entropy: a
    weight that stayed would enlarge it.

    Probabilities are the largest tensors where there are many classes: they are computed some planes at a time, and for
    the backward pass again.

    Args:
        logits: (B, K + 1, D, H, W).
        labels: (B, D, H, W), -1 to be ignored.

    Source: Milletari et al. 2016, arXiv:1606.04797, with squares left out of the denominator as in nnU-Net. Weights
    by inverse frequency are compared in Cui et al. 2019, arXiv:1901.05555; that they end with the Dice is ours.
    """
    planes = max(1, PIECE // logits[:, :, 0].numel())
    pieces = zip(logits.split(planes, 2), labels.split(planes, 1), strict=True)
    sums = [checkpoint(_sum_classes, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    sizes, entropies, both, predicted = torch.stack(sums).sum(0)  # B K+1
    total = sizes.sum(0)
    learned = (2 * both.sum(0) + 1) / (predicted.sum(0) + total + 1)
    weights = (total.sum() / total.clamp(min=1)) ** ((1 - learned.detach()) / 2)
    entropy = (entropies.sum(0) * weights).sum() / (total * weights).sum().clamp(min=1)
    dice = (2 * both + 1) / (predicted + sizes + 1)
    loss: torch.Tensor = (entropy + 1 - dice[:, 1:].mean()) / 2
    return loss


def _sum_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over the voxels of some planes for each row and class, (4, B, K + 1).

    They are the voxels of the class; the cross-entropy in them; the probability of the class in them, and everywhere.
    """
    labels = labels.flatten(2)  # B D P
    logs = logits.float().flatten(3).log_softmax(1)  # B K+1 D P
    right = logs.gather(1, labels.clamp(min=0)[:, None])[:, 0]  # of the class that is there
    values = torch.stack([torch.ones_like(right), -right, right.exp()])
    sums = logs.new_zeros(*values.shape[:3], logits.shape[1] + 1)  # in each plane; the first class is what is ignored
    sums = sums.scatter_add(3, (labels + 1).expand_as(values), values)[..., 1:].sum(2)
    predicted = torch.einsum("bkdp,bdp->bk", logs.exp(), (labels >= 0).to(logs))
    return torch.cat([sums, predicted[None]])
