"""Text from anywhere, made safe for a terminal."""


def printable(text: str) -> str:
    """Without control characters: names and labels of an adapter are anyone's, and a terminal obeys some."""
    return "".join(c if c.isprintable() else "�" for c in text)
