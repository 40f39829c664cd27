"""An adapter as a folder: save, load, check, describe."""
