"""Frozen leading blocks run once per example; every epoch starts from what they put out."""
