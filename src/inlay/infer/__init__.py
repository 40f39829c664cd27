"""Use of a loaded adapter: on pictures."""
