"""Atomic writing of files and folders, bounded JSON, safetensors headers, and names of folders or Hub ids."""
