"""The grid in which the patches of the images under way lie: taken from the images, as tokens do not tell it."""

from typing import Any

import torch
from torch import nn

from inlay.errors import Unsupported


class PatchGrid:
    """A forward hook on the module that makes tokens of images; whoever reads the grid calls `hold` and `release`.

    Images need not be square: a grid of 2 x 8 patches has as many tokens as one of 4 x 4. A block that is computed
    again for the backward, after images of another grid, has other shapes than before, which torch refuses.

    Attributes:
        height: Of the grid, in patches.
        width: Of the grid, in patches.
        leading: Tokens in front of those of the patches: class token, distillation token, registers.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        self.height = self.width = self.leading = 0
        patches = next((module for module in embeddings.modules() if isinstance(module, nn.Conv2d)), None)
        if patches is None or (isinstance(patches.padding, str) and patches.padding != "valid"):
            raise Unsupported(
                f"a {type(embeddings).__name__} does not make its patches by a convolution, so the grid in which they "
                "lie is not known; use a method that does not convolve."
            )
        self._kernel, self._stride = patches.kernel_size, patches.stride
        self._padding = (0, 0) if isinstance(patches.padding, str) else patches.padding
        self._readers = 0
        self._embeddings = embeddings
        self._handle: Any = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        """Note the grid of the images (B, C, H, W) of which tokens (B, N, D), or a map (B, H, W, D), were made."""
        if output.ndim == 4:
            self.height, self.width = output.shape[1:3]
            return
        pixels = args[0] if args else kwargs["pixel_values"]
        axes = zip(pixels.shape[-2:], self._padding, self._kernel, self._stride, strict=True)
        self.height, self.width = ((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in axes)
        self.leading = output.shape[1] - self.height * self.width

    def hold(self) -> None:
        """One more reads the grid."""
        if not self._readers:
            self._handle = self._embeddings.register_forward_hook(self, with_kwargs=True)
        self._readers += 1

    def release(self) -> None:
        """One fewer reads it; after the last one the hook is gone."""
        self._readers -= 1
        if not self._readers:
            self._handle.remove()


def find_patch_grid(embeddings: nn.Module) -> PatchGrid:
    """The hook that a module has already, or a new one."""
    found = (hook for hook in embeddings._forward_hooks.values() if isinstance(hook, PatchGrid))
    return next(found, None) or PatchGrid(embeddings)
