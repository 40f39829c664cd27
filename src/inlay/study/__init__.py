"""Compare methods on one's own task, and plan what a training will take."""
