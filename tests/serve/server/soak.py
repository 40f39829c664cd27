"""Many clients at once while adapters come, are replaced and go, and the judge of every answer."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import numpy as np
from PIL import Image

from inlay import load_adapter, predict
from inlay.adapters.file import read_adapter
from inlay.serve.connections import Connections
from serve.banked import VIT, save

NOBODY, MISFIT = "nobody", "misfit"  # an adapter that is never there, and one that does not fit
PATIENCE_S = 60
Change = Callable[[str, Path | None], Awaitable[None]]  # serve what a folder holds under a name, or no longer


@dataclass
class Truth:
    """What each version of an adapter says of each image, alone.

    Attributes:
        folders: Of the versions; any may have any name.
        images: Files.
        digests: Of the folders.
        answers: Probabilities by digest (images, K).
    """

    folders: Sequence[Path]
    images: Sequence[bytes]
    digests: dict[Path, str] = field(default_factory=dict)
    answers: dict[str, np.ndarray] = field(default_factory=dict)


def make_versions(folder: Path, count: int) -> list[Path]:
    """So many adapters of different methods and widths."""
    methods = [("lora", 2), ("bottleneck", 4), ("lora", 8), ("attention-prefix", 4), ("visual-prompt", 3), ("lora", 4)]
    return [save(VIT, methods[i % len(methods)], folder / f"version{i}", seed=i) for i in range(count)]


def find_truth(folders: Sequence[Path], seed: int = 0, images: int = 6) -> Truth:
    """Computed by each adapter alone, one image after the other; no two versions agree, nor one with the base."""
    truth = Truth(folders, [make_png(seed + i) for i in range(images)])
    for folder in folders:
        loaded, digest = load_adapter(folder), read_adapter(folder).digest
        found = [predict(loaded, [image])[0].probabilities for image in truth.images]
        truth.digests[folder], truth.answers[digest] = digest, np.array(found)
    every = [*truth.answers.values(), _ask_base(folders[0], truth.images)]
    for i, one in enumerate(every):
        assert all(np.abs(one - other).max(1).min() > 2e-3 for other in every[:i]), "two versions say the same"
    return truth


def _ask_base(folder: Path, images: Sequence[bytes]) -> np.ndarray:
    loaded = load_adapter(folder)
    with loaded.model.disable_adapter():
        return np.array([predict(loaded, [image])[0].probabilities for image in images])


def make_png(seed: int) -> bytes:
    """An image of noise."""
    draw = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


class Soak:
    """Asks a server, changes what it serves, and keeps what was wrong.

    Attributes:
        counts: Answers by status; changes by kind.
        wrong: In words.

    Args:
        url: Of the server.
        truth: What is right.
        served: What it serves now, by name.
        change: How that is changed.
        seed: Of all that is drawn.
    """

    def __init__(self, url: str, truth: Truth, served: Mapping[str, Path], change: Change, seed: int = 0) -> None:
        self.url, self.truth, self.change = url, truth, change
        self.draw = random.Random(seed)
        self.draw_change = random.Random(seed)  # of its own: the same changes, however the requests fall
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        # By name: from when on it may have, and from when on it must have, this digest, or none.
        self.history = {name: [(0.0, 0.0, truth.digests[folder])] for name, folder in served.items()}

    async def run(self, requests: int, clients: int = 16, changes_every: int = 10) -> None:
        """So many requests; after each few of them one change."""
        self.left, self.changes_due = requests, asyncio.Semaphore(0)
        self.changes_every = changes_every
        connections = Connections(self.url)
        changer = asyncio.create_task(self._change_often())
        try:
            await asyncio.gather(*(self._ask_often(connections) for _ in range(clients)))
        finally:
            changer.cancel()
            (ended,) = await asyncio.gather(changer, return_exceptions=True)
            if not isinstance(ended, asyncio.CancelledError | OSError | h11.RemoteProtocolError):
                self.wrong.append(f"a change failed: {ended!r}")
            connections.close()

    async def _ask_often(self, connections: Connections) -> None:
        while self.left > 0:
            self.left -= 1
            if self.left % self.changes_every == 0:
                self.changes_due.release()
            name = self.draw.choice([*self.history, *self.history, *self.history, NOBODY, MISFIT])
            await self._ask(connections, name, self.draw.randrange(len(self.truth.images)))

    async def _ask(self, connections: Connections, name: str, image: int) -> None:
        asked = {"model": name, "image": base64.b64encode(self.truth.images[image]).decode()}
        asking = connections.ask(
            "POST", "/v1/classify", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        patience = self.draw.random() * 0.02 if self.draw.random() < 0.05 else PATIENCE_S
        sent = time.monotonic()
        try:
            response = await asyncio.wait_for(asking, patience)
        except TimeoutError:
            self.counts["left"] += 1
            if patience == PATIENCE_S:
                self.wrong.append(f"{name} was not answered in {PATIENCE_S} s")
            return
        except (OSError, h11.RemoteProtocolError) as error:
            self.counts[f"none: {type(error).__name__}"] += 1
            return
        self.counts[str(response.status)] += 1
        if reason := self._judge(name, image, response.status, response.read_json(), sent):
            self.wrong.append(f"{name}: {reason}")
        if response.status == 404:  # sooner than an answer: else all requests pass while one adapter is added
            await asyncio.sleep(0.1)

    def _judge(self, name: str, image: int, status: int, answer: Any, sent: float) -> str | None:
        """Why an answer is wrong."""
        if status in (429, 503, 504):
            return None
        possible = self._list_possible(name, sent)
        if status == 404:
            return None if None in possible else "404, and it was there all the time"
        if status == 409:
            return None if name == MISFIT else f"409: {answer}"
        if status != 200:
            return f"{status}: {answer}"
        digest = answer["adapter_digest"]
        if answer["model"] != name or digest not in possible:
            return f"answered by {answer['model']}, {digest}; it could be {possible}"
        found, expected = list(answer["probabilities"].values()), self.truth.answers[digest][image]
        if not np.allclose(found, expected, rtol=1e-4, atol=1e-5):
            others = [other for other, rows in self.truth.answers.items() if np.allclose(found, rows[image], atol=1e-4)]
            return f"{found} is not {expected} of {digest}, but that of {others}"
        return None

    def _list_possible(self, name: str, sent: float) -> list[str | None]:
        """What a name may have had since then."""
        states = self.history.get(name, [(0.0, 0.0, None)])
        ends = [settled for _, settled, _ in states[1:]] + [float("inf")]
        return [digest for (_, _, digest), end in zip(states, ends, strict=True) if end >= sent]

    async def _change_often(self) -> None:
        while True:
            await self.changes_due.acquire()
            name = self.draw_change.choice(list(self.history))
            states = self.history[name]
            folder = (
                None
                if states[-1][2] and self.draw_change.random() < 0.3
                else self.draw_change.choice(list(self.truth.folders))
            )
            digest = folder and self.truth.digests[folder]
            states.append((time.monotonic(), float("inf"), digest))
            await self.change(name, folder)
            states[-1] = (states[-1][0], time.monotonic(), digest)
            self.counts["removed" if folder is None else "added" if states[-2][2] is None else "replaced"] += 1
