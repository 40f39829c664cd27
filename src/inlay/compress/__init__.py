"""Make a model smaller or faster: prune and heal it, quantise it, export it."""
