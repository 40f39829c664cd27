"""A frozen base: loaded by name, its processors, its 8-bit and 4-bit forms, and the sites where methods attach."""
