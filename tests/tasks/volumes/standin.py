"""A small segmenter with the adapted SAM's signature: predictable answers, and a count of its encoder's runs."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from inlay.tasks import TASKS
from inlay.tasks.volumes.scan import VolumeProcessor

LABELS = ["bright", "dark"]


class Segmenter(nn.Module):
    """Blurred bright voxels are class 1, dark ones class 2; clicks, boxes and the answer before add to that.

    A click adds to its class within two voxels, a box within itself, and the logits before are added at a tenth.
    """

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.encoded, self.decoded, self.seen = 0, 0, []

    def forward(
        self, pixel_values=None, input_points=None, input_labels=None, input_boxes=None, input_box_labels=None,
        input_masks=None, image_embeddings=None,
    ):  # fmt: skip
        if image_embeddings is None:
            self.encoded += len(pixel_values)
            image_embeddings = F.avg_pool3d(pixel_values, 3, stride=1, padding=1)
        self.decoded += len(image_embeddings)
        self.seen.append((input_points, input_labels, input_boxes, input_masks))
        e = image_embeddings[:, 0]
        logits = torch.stack([torch.full_like(e, 0.5), self.gain * e, -self.gain * e], 1)
        axes = [torch.arange(n, dtype=torch.float32).reshape([-1 if i == j else 1 for j in range(3)])
                for i, n in enumerate(e.shape[1:])]  # fmt: skip
        for b in range(len(e)):
            if input_points is not None:
                for point, label in zip(input_points[b].tolist(), input_labels[b].tolist(), strict=True):
                    if label >= 0:
                        logits[b, label] += (9.0 if label else 15.0) * (
                            sum((a - p) ** 2 for a, p in zip(axes, point, strict=True)) <= 4
                        )
            if input_boxes is not None:
                for box, label in zip(input_boxes[b].tolist(), input_box_labels[b].tolist(), strict=True):
                    inside = [(a >= low) & (a <= high) for a, low, high in zip(axes, box[:3], box[3:], strict=True)]
                    logits[b, label] += 9.0 * (inside[0] & inside[1] & inside[2])
        if input_masks is not None and input_masks.ndim == 4:  # a mask of classes
            logits = logits + 4.0 * F.one_hot(input_masks.long(), 3).movedim(-1, 1)
        elif input_masks is not None:
            logits = logits + 0.1 * input_masks
        return SimpleNamespace(logits=logits, image_embeddings=image_embeddings)


def adapter(crop=(16, 16, 16), spacing_mm=None, flip=(0, 1, 2), values=None):
    """What `load_adapter` would give."""
    return SimpleNamespace(
        model=Segmenter().eval(),
        processor=VolumeProcessor(spacing_mm, crop, flip=flip, values=values),
        labels=list(LABELS),
        task=TASKS["volume-segmentation"],
        name="stand-in",
    )


def blobs(shape, seed=0):
    """A noisy scan (X, Y, Z) with a bright and a dark ball, as int16."""
    generator = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    image = generator.normal(100, 5, shape)
    for centre, value in ((0.3, 300), (0.7, -100)):
        image[np.linalg.norm((at - np.array(shape) * centre) / (np.array(shape) * 0.15), axis=-1) < 1] = value
    return image.astype(np.int16)
