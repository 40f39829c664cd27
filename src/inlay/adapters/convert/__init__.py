"""Adapters that other programs have saved."""
