"""generators of the embedded data, and the embedded weights next to them."""
