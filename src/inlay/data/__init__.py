"""Data: images, text, masks and volumes; synthetic pictures that need no download."""
