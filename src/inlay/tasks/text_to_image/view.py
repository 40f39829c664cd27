"""Captioned images as a pipeline is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch.utils.data import Dataset

from inlay.tasks.text_to_image.data import Captioned, open_captioned
from inlay.tasks.text_to_image.processor import PromptProcessor


class PromptView(Dataset[dict[str, Any]]):
    """One part of the data.

    An item has `pixel_values` (3, S, S) from -1 to 1, `input_ids` (N,) of each text encoder, and its `weight`. With a
    seed it also has `timesteps` () and `noise` (c, h, w), which are then the same at each evaluation.

    Args:
        rows: Images with prompts.
        processor: Of the base.
        flip: Mirror at random; for subjects without a left and right.
        drop_prompts: Share of the items whose prompt is left out, which classifier-free guidance learns from.
        seed: Of fixed noise, for validation.
        levels: Number of noise levels, for validation.
    """

    def __init__(
        self,
        rows: Sequence[Captioned],
        processor: PromptProcessor,
        *,
        flip: bool = False,
        drop_prompts: float = 0.0,
        seed: int | None = None,
        levels: int = 1000,
    ) -> None:
        self.rows, self.processor = rows, processor
        self.prior: Sequence[Captioned] = ()
        self.flip, self.drop_prompts, self.seed, self.levels = flip, drop_prompts, seed, levels

    def with_prior(self, prior: Sequence[Captioned]) -> PromptView:
        """As many items again, each an image of the prior that is drawn at random."""
        other = copy(self)
        other.prior = prior
        return other

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.prior else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        subject = int(index) < len(self.rows)
        row = self.rows[int(index)] if subject else self.prior[int(torch.randint(len(self.prior), ()))]
        pixels = self.processor.read_pixels(open_captioned(row))
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        prompt = "" if self.drop_prompts and torch.rand(()) < self.drop_prompts else row.prompt
        tokens = {name: ids[0] for name, ids in self.processor.tokenize([prompt]).items()}
        item = {"pixel_values": pixels, **tokens, "weight": torch.tensor(row.weight)}
        return item if self.seed is None else item | self._fix_noise(int(index))

    def _fix_noise(self, index: int) -> dict[str, Any]:
        """Noise of this item; the levels of all items are spread evenly."""
        generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + index)
        level = int((index + 0.5) / len(self) * self.levels)
        noise = torch.randn(self.processor.latent_shape, generator=generator)
        return {"timesteps": torch.tensor(level), "noise": noise}
