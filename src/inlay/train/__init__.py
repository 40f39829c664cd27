"""Training: TrainConfig holds the settings, fit is one visible accelerate loop."""
