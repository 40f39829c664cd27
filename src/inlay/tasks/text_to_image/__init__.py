"""Images that are painted after a prompt."""
