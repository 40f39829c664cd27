"""SSF in a bank."""

from typing import Any

import torch
from typing_extensions import override

from inlay.methods.ssf import SsfLayer
from inlay.serve.bank_layer import BankLayer, Tensors


class SsfBank(BankLayer, SsfLayer):
    """Scale and shift of each row; the scale is stored less one, so that zeros change nothing."""

    stands_for = SsfLayer

    @override
    def make_stack_values(self, tensors: Tensors, settings: None) -> dict[str, torch.Tensor]:
        values = {"scale": tensors["inlay_ssf_scale"].float() - 1}
        if (shift := tensors.get("inlay_ssf_shift")) is not None:
            values["shift"] = shift.float()
        return values

    @override
    def forward_rows(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.base_layer(*args, **kwargs)
        result = output.to(torch.float32) * (1 + self._take("scale", output))
        if "shift" in self.stacks._buffers:
            result = result + self._take("shift", output)
        return result.to(output.dtype)

    def _take(self, key: str, output: torch.Tensor) -> torch.Tensor:
        """Each row's vector in the shape of the output."""
        vector = self.take_vectors(key, len(output))[:, 0]  # B or 1, features
        axes = [1] * (output.ndim - 2)
        return vector.reshape(len(vector), -1, *axes) if self.channels_first else vector.reshape(len(vector), *axes, -1)
