"""Generators of the embedded data, and the embedded weights beside them."""
