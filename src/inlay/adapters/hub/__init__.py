"""Adapters on the Hub and in folders of adapters: push, pull, index, search."""
