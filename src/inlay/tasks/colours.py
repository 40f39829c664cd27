"""Colours of classes and masks in images."""

import colorsys

# Seven that all eyes tell apart, and from grey: after Okabe & Ito 2008. Then each the farthest from all before it by
# CIEDE2000, of those with a lightness of 46 to 93 and a chroma of 36 or more: no two of the 32 are nearer than 13.
# After these hues by the golden angle.
COLOURS = (
    "#ff5a36", "#3fc1ff", "#f5e342", "#2fd08a", "#e58fd0", "#ffa31a", "#4a7dff", "#777722",
    "#dd0066", "#bb00ff", "#55ffff", "#aa6611", "#008866", "#88ff00", "#bbbbff", "#66aa00",
    "#ffaa99", "#7766aa", "#bbaa66", "#11aaaa", "#aa5544", "#cceeaa", "#dd7788", "#ff00bb",
    "#bb77ff", "#008811", "#aa6699", "#0088bb", "#bb8800", "#ee7711", "#ff0044", "#6655ff",
)  # fmt: skip


def colour(k: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of class k = 1, 2 ..."""
    if k > len(COLOURS):
        r, g, b = colorsys.hls_to_rgb(k * 0.618 % 1, 0.45 + 0.3 * (k % 2), 0.9)
        return round(r * 255), round(g * 255), round(b * 255)
    code = int(COLOURS[k - 1][1:], 16)
    return code >> 16, code >> 8 & 255, code & 255
