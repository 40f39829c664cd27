"""The `inlay` command, and the command line of recipes."""
