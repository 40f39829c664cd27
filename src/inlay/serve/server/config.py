"""The options of a server. This module imports nothing slow: the command line shows them as its own."""

from dataclasses import dataclass

from inlay.options import check_options, option
from inlay.tasks.serving import Limits


@dataclass
class ServiceConfig:
    """How a server gathers and bounds requests."""

    max_batch: int = option(64, "Requests in a batch at most.", least=1)
    max_wait_ms: float = option(0.0, "How long a request waits for others to fill its batch.", least=0)
    max_queue: int = option(1024, "Requests that may wait; more get status 429.", least=1)
    timeout_s: float = option(60.0, "A request that has waited longer gets status 504.", above=0)
    max_body_mb: float = option(64.0, "Size of a request's body.", above=0)
    max_pixels: int = option(50_000_000, "Pixels of an image.", least=1)
    max_voxels: int = option(200_000_000, "Voxels of a scan.", least=1)
    max_tokens: int = option(4_096, "Tokens of a text.", least=1)
    max_new_tokens: int = option(1_024, "Tokens to generate for a request.", least=1)
    max_write_s: float = option(600.0, "A text that takes longer to write gets status 504.", above=0)
    cache_mb: float = option(2048.0, "Memory for the keys and values of all texts under way.", above=0)
    threads: int = option(4, "Threads that decode requests.", least=1)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def limits(self) -> Limits:
        """Those of a task's requests."""
        return Limits(self.max_pixels, self.max_voxels, self.max_tokens, self.max_new_tokens)
