"""Masks that answer points and boxes."""
