"""The loss of a denoiser: mean square error of what it predicts, weighted by example and by noise level."""

from typing import Any

from torch import Tensor, nn

NOT_INPUTS = ("weight",)  # of a batch: for the loss only


class DenoisingLoss:
    """Mean over the rows of a batch of the squared error, each row with its `weight`.

    Args:
        snr_gamma: Where given, noise levels of a signal-to-noise ratio above it count less: min-SNR weighting (Hang et
            al. 2023, arXiv:2303.09556). Not for flow matching, which has no such ratio.
        prediction_type: Of the scheduler, by which that weight depends.
    """

    def __init__(self, snr_gamma: float | None = None, prediction_type: str = "epsilon") -> None:
        self.snr_gamma, self.prediction_type = snr_gamma, prediction_type

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Compute the output of the model, with the weighted loss."""
        output = model(**{name: value for name, value in batch.items() if name not in NOT_INPUTS})
        errors = (output.prediction.float() - output.target.float()).square().flatten(1).mean(1)  # B
        weights = batch.get("weight")
        if self.snr_gamma is not None and output.alphas_cumprod is not None:
            errors = errors * self._weigh_levels(output.alphas_cumprod.float())
        output.loss = errors.mean() if weights is None else (errors * weights).sum() / weights.sum()
        return output

    def weight(self, batch: dict[str, Any]) -> float:
        """The sum of the weights of the rows, or their number."""
        weights = batch.get("weight")
        return len(batch["pixel_values"]) if weights is None else float(weights.sum())

    def _weigh_levels(self, alphas_cumprod: Tensor) -> Tensor:
        """The weight of each row's noise level, 1 where the ratio is at most gamma and noise is predicted."""
        ratio = alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-8)
        capped = ratio.clamp_max(self.snr_gamma)
        divisor = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": ratio.new_ones(())}[self.prediction_type]
        return capped / divisor.clamp_min(1e-8)
