"""Adapters on disk: saved whole, checked before they are believed."""
