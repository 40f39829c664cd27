"""Folders written whole or not at all, bounded JSON, safetensors headers, and names of folders or Hub ids."""
