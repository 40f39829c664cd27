"""Colours of classes and masks in images."""

import colorsys

# Told apart by all eyes, and from grey: after Okabe & Ito 2008. From the eighth class on hues by the golden angle.
COLOURS = ("#ff5a36", "#3fc1ff", "#f5e342", "#2fd08a", "#e58fd0", "#ffa31a", "#4a7dff")


def colour(k: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of class k = 1, 2 ..."""
    if k > len(COLOURS):
        r, g, b = colorsys.hls_to_rgb(k * 0.618 % 1, 0.45 + 0.3 * (k % 2), 0.9)
        return round(r * 255), round(g * 255), round(b * 255)
    code = int(COLOURS[k - 1][1:], 16)
    return code >> 16, code >> 8 & 255, code & 255
