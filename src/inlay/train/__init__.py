"""Training: TrainConfig, and fit, one visible accelerate loop."""
