"""Run frozen leading blocks once per example, store their output, and start every epoch from it."""
