"""The options of a load. This module imports nothing slow: the command line shows them as its own."""

from dataclasses import dataclass
from typing import Literal

from inlay.options import check_options, option

Kind = Literal["image", "text", "prompt", "mask", "scan"]


@dataclass
class LoadConfig:
    """How many requests a load generator sends, when, and of what."""

    requests: int = option(1000, "Requests that are measured.", least=1)
    warm_up: int = option(64, "Requests before them, which are not counted.", least=0)
    clients: int = option(64, "Clients at the same time; each sends its next request once it is answered.", least=1)
    kind: Kind | None = option(None, "What requests hold; default: what the server says that it takes.")
    protocol: Literal["v1", "v2"] = option(
        "v1",
        "v1: /v1/classify or /v1/segment with base64, and /v1/completions for prompts. v2: Open Inference Protocol, "
        "binary.",
    )
    inputs: str | None = option(
        None, "A folder of images, a folder of NIfTI scans, or a file of one text a line; default: made from the seed."
    )
    side: int = option(224, "Pixels of a side of images that are made.", least=8)
    scan_side: int = option(48, "Voxels of a side of scans that are made, of 1 mm.", least=8)
    popularity: Literal["uniform", "zipf"] = option(
        "uniform", "How often adapters are asked: all alike, or the n-th 1/n times as often as the first."
    )
    new_tokens: int = option(32, "Tokens that are generated for a prompt.", least=1)
    timeout_s: float = option(60.0, "A request without an answer for so long is counted as an error.", above=0)
    seed: int = option(0, "Of inputs, adapters and arrivals.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
