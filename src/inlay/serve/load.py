"""A load generator: clients that ask one request after the other, or requests that arrive at a rate of their own.

In the closed loop a slow server is asked less often, so it shows what the server can do, and not how long users would
wait. In the open loop requests arrive as those of many users do (a Poisson process), whether or not earlier ones are
answered, and the latency of a request counts from the moment when it was due: a server that stands still for a second
delays all that would have come in it, and all of them are counted. The error of counting otherwise is known as
coordinated omission (Tene, "How NOT to measure latency", 2013).
"""

import asyncio
import base64
import gzip
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h11
import numpy as np

from inlay.errors import BadInput, Unreachable
from inlay.serve.connections import Connections, Response
from inlay.serve.load_config import Kind, LoadConfig

KEY = "INLAY_API_KEY"  # environment variable: the key of the server
DIFFERENT = 64  # inputs that are made
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SCANS = (".nii", ".nii.gz")
DIFFERENT_SCANS = 4
WORDS = "the a small red old river house bird stone light walks sees under over near quiet and with green door"


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are those of `time.perf_counter`, in seconds.

    Attributes:
        due: When it should have been sent.
        sent: When it was.
        ended: When all of the answer was there.
        status: "200", another status of HTTP, or what is wrong with the answer.
        first: When the first part of a text came.
        tokens: Of that text.
    """

    due: float
    sent: float
    ended: float
    status: str
    first: float | None = None
    tokens: int = 0


def run_load(
    url: str,
    config: LoadConfig,
    adapters: Sequence[str] = (),
    rates: Sequence[float] = (),
) -> dict[str, Any]:
    """Send requests to a server, and say how fast and how late it answered.

    Args:
        url: Of the server.
        config: What is sent.
        adapters: Names to ask for; default: all that the server lists.
        rates: Arrivals a second of an open loop, one load after the other; without one, the closed loop.

    Returns:
        What was sent, and `loads`: for each the requests a second that were answered, percentiles of latency in ms,
        answers by status, and what the generator itself took.

    Raises:
        Unreachable: No server answers there.
        BadInput: A rate that is not positive, inputs that cannot be read, or a server that does not say what it takes.
    """
    if wrong := [rate for rate in rates if not 0 < rate < float("inf")]:
        raise BadInput(f"a rate is a positive number of requests a second, got {wrong[0]:g}.")
    key = os.environ.get(KEY)
    connections = Connections(url, {"authorization": f"Bearer {key}"} if key else None)
    return asyncio.run(send_load(connections, config, adapters, rates))


async def send_load(
    connections: Connections, config: LoadConfig, adapters: Sequence[str] = (), rates: Sequence[float] = ()
) -> dict[str, Any]:
    """As `run_load`, over these connections, which are closed afterwards."""
    try:
        names = list(adapters) or await _list_adapters(connections)
        kind = config.kind or await _find_kind(connections, names[0])
        sender = _Sender(connections, config, kind, names)
        await _run_closed(sender, range(config.warm_up))
        loads = []
        for number, rate in enumerate(rates or [None]):
            first = config.warm_up + number * config.requests
            places = range(first, first + config.requests)
            cpu, begun = time.process_time(), time.perf_counter()
            if rate is None:
                outcomes = await _run_closed(sender, places)
            else:
                outcomes = await _run_open(sender, places, rate)
            cpu, seconds = time.process_time() - cpu, time.perf_counter() - begun
            way = {"clients": config.clients} if rate is None else {"rate": rate}
            loads.append({**way, **summarise(outcomes, seconds), "generator_cpu_ms": 1e3 * cpu / len(outcomes)})
    except OSError as error:
        raise Unreachable(f"no server answers at {connections.url}: {error.strerror or error}.") from error
    finally:
        connections.close()
    return {"url": connections.url, "kind": kind, "adapters": len(names), "seed": config.seed, "loads": loads}


async def _list_adapters(connections: Connections) -> list[str]:
    response = await connections.ask("GET", "/v1/models")
    if response.status != 200:
        raise BadInput(f"{connections.url}/v1/models answers {response.status}: {_read_error(response)}")
    names = [model["id"] for model in response.read_json()["data"] if model.get("parent")]
    if not names:
        raise BadInput(f"{connections.url} lists no adapters.")
    return names


async def _find_kind(connections: Connections, adapter: str) -> Kind:
    response = await connections.ask("GET", f"/v2/models/{quote(adapter, safe='')}")
    found = response.read_json().get("inputs", ()) if response.status == 200 else ()
    names = {tensor["name"] for tensor in found}
    if {"image", "boxes"} <= names:
        return "mask"
    kinds: tuple[Kind, ...] = ("image", "prompt", "text", "scan")
    for kind in kinds:
        if kind in names:
            return kind
    raise BadInput(
        f"{connections.url} does not say what its adapters take; say so by kind: {', '.join((*kinds, 'mask'))}."
    )


def _read_error(response: Response) -> str:
    try:
        error = response.read_json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return "no reason given."


class _Sender:
    """Makes the n-th request, always the same one for a seed, and sends it."""

    def __init__(self, connections: Connections, config: LoadConfig, kind: Kind, adapters: Sequence[str]) -> None:
        self.connections, self.config, self.kind, self.adapters = connections, config, kind, adapters
        self.inputs = _read_inputs(config.inputs, kind) if config.inputs else list(_make_inputs(config, kind))
        self.points = [_find_centre(given) for given in self.inputs] if kind == "mask" else []
        weights = np.ones(len(adapters))
        if config.popularity == "zipf":
            weights /= np.arange(1, len(adapters) + 1)
        self._shares = weights / weights.sum()

    async def send(self, place: int, due: float | None = None) -> Outcome:
        """The request at a place of the sequence, now."""
        draw = np.random.default_rng((self.config.seed, place))
        name = self.adapters[draw.choice(len(self.adapters), p=self._shares)]
        target, body, headers = self._make_request(name, int(draw.integers(len(self.inputs))))
        first, tokens, sent = None, 0, time.perf_counter()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self.connections.ask("POST", target, body, headers)
            status = str(response.status)
            if response.status == 200 and self.kind == "prompt":
                status, first, tokens = _judge_stream(response, name)
            elif response.status == 200:
                status = _judge(response.body, name)
        except TimeoutError:
            status = f"none in {self.config.timeout_s:g} s"
        except (OSError, h11.RemoteProtocolError) as error:
            status = f"none: {type(error).__name__}"
        return Outcome(sent if due is None else due, sent, time.perf_counter(), status, first, tokens)

    def _make_request(self, name: str, number: int) -> tuple[str, bytes, dict[str, str]]:
        given = self.inputs[number]
        if self.kind == "prompt":
            asked = {"model": name, "prompt": given.decode(), "max_tokens": self.config.new_tokens, "temperature": 0}
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            return "/v1/completions", json.dumps(asked).encode(), JSON
        if self.config.protocol == "v1":
            value = given.decode() if self.kind == "text" else base64.b64encode(given).decode()
            asked = {"model": name, FIELDS[self.kind]: value}
            if self.points:
                asked["points"] = [self.points[number]]
            return ROUTES[self.kind], json.dumps(asked).encode(), JSON
        data = len(given).to_bytes(4, "little") + given
        size = {"binary_data_size": len(data)}
        tensors = [{"name": FIELDS[self.kind], "datatype": "BYTES", "shape": [1], "parameters": size}]
        if self.points:
            tensors.append(
                {"name": "points", "datatype": "FP32", "shape": [1, 1, 2], "data": list(self.points[number])}
            )
        outputs = [{"name": output} for output in OUTPUTS.get(self.kind, ())]
        header = json.dumps({"inputs": tensors, "outputs": outputs}).encode()
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(header))}
        return f"/v2/models/{quote(name, safe='')}/infer", header + data, headers


JSON = {"content-type": "application/json"}
FIELDS: dict[Kind, str] = {"image": "image", "text": "text", "mask": "image", "scan": "scan"}
ROUTES: dict[Kind, str] = dict.fromkeys(FIELDS, "/v1/classify") | dict.fromkeys(("mask", "scan"), "/v1/segment")
OUTPUTS: dict[Kind, tuple[str, ...]] = {"scan": ("mask_file", "volumes_ml")}  # as people get; else all


def _judge(found: bytes, name: str) -> str:
    """ "200" if it is an answer of this adapter."""
    try:
        answer = json.loads(found)
    except ValueError:
        return "200, but no JSON"
    if not isinstance(answer, dict):
        return "200, but no JSON object"
    if "error" in answer:
        return "200, but an error"
    return "200" if name in (answer.get("model"), answer.get("model_name")) else "200, but of another adapter"


def _judge_stream(response: Response, name: str) -> tuple[str, float | None, int]:
    """The same of a text that came in events, when the first one came, and how many tokens it has.

    An event may hold several tokens, or part of one; their number is in the last, as `usage`.
    """
    first, events, rest = None, [], b""
    for arrived, part in response.parts:
        *lines, rest = (rest + part).split(b"\n")
        found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        if found and first is None:
            first = arrived
        events += found
    if len(events) < 2 or events[-1] != b"[DONE]":
        return "200, but broken off", first, 0
    status = _judge(events[-2], name)
    usage = json.loads(events[-2]).get("usage") if status == "200" else None
    return status, first, usage["completion_tokens"] if usage else len(events) - 1


async def _run_closed(sender: _Sender, places: Sequence[int]) -> list[Outcome]:
    waiting = iter(places)

    async def ask_in_turn() -> list[Outcome]:
        return [await sender.send(place) for place in waiting]

    found = await asyncio.gather(*(ask_in_turn() for _ in range(sender.config.clients)))
    return [outcome for one in found for outcome in one]


async def _run_open(sender: _Sender, places: Sequence[int], rate: float) -> list[Outcome]:
    tasks, begun = [], time.perf_counter()
    for place, after in zip(places, draw_arrivals(len(places), rate, sender.config.seed), strict=True):
        await asyncio.sleep(max(0.0, begun + after - time.perf_counter()))
        tasks.append(asyncio.create_task(sender.send(place, begun + after)))
    return await asyncio.gather(*tasks)


def draw_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When requests arrive in a Poisson process of so many a second, in seconds from its begin."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def summarise(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Figures of a load.

    Args:
        outcomes: Of its requests.
        seconds: From its begin to the last answer.

    Returns:
        `per_second`: answered requests; `latency_ms` of those; `statuses` of all; `late_ms`: how long after they were
        due requests were sent, which is the generator's own delay. Of texts also `first_token_ms`, `token_ms` between
        two (the mean of a text), and `tokens_per_second`.
    """
    answered = [outcome for outcome in outcomes if outcome.status == "200"]
    facts: dict[str, Any] = {
        "requests": len(outcomes),
        "seconds": seconds,
        "per_second": len(answered) / seconds,
        "latency_ms": find_percentiles([outcome.ended - outcome.due for outcome in answered]),
        "statuses": dict(sorted(Counter(outcome.status for outcome in outcomes).items())),
        "late_ms": find_percentiles([outcome.sent - outcome.due for outcome in outcomes]),
    }
    texts = [(outcome, outcome.first) for outcome in answered if outcome.first is not None]
    if texts:
        facts["first_token_ms"] = find_percentiles([first - text.due for text, first in texts])
        paces = [(text.ended - first) / (text.tokens - 1) for text, first in texts if text.tokens > 1]
        facts["token_ms"] = find_percentiles(paces)
        facts["tokens_per_second"] = sum(text.tokens for text, _ in texts) / seconds
    return facts


def find_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest, in ms; empty where there is nothing."""
    if not seconds:
        return {}
    values = np.percentile(seconds, (50, 95, 99, 100)) * 1e3
    return dict(zip(("p50", "p95", "p99", "max"), values.tolist(), strict=True))


def _read_inputs(path: str, kind: Kind) -> list[bytes]:
    place = Path(path).expanduser()
    if kind in ("image", "mask", "scan"):
        suffixes = SCANS if kind == "scan" else SUFFIXES
        found = [file.read_bytes() for file in sorted(place.rglob("*")) if file.name.lower().endswith(suffixes)]
    else:
        found = [line.encode() for line in place.read_text().splitlines() if line.strip()] if place.is_file() else []
    if not found:
        wanted = {"image": "a folder of images", "mask": "a folder of images", "scan": "a folder of NIfTI scans"}.get(
            kind, "a file of one text a line"
        )
        raise BadInput(f"{path} is not {wanted}.")
    return found


def _make_inputs(config: LoadConfig, kind: Kind) -> Iterator[bytes]:
    """JPEGs of soft colours, scans of soft greys, or texts of 4 to 64 words."""
    from PIL import Image

    draw = np.random.default_rng(config.seed)
    for _ in range(DIFFERENT_SCANS if kind == "scan" else DIFFERENT):
        if kind == "scan":
            yield _make_scan(draw, config.scan_side)
        elif kind in ("image", "mask"):
            colours = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            file = io.BytesIO()
            colours.resize((config.side, config.side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            yield file.getvalue()
        else:
            words = draw.choice(WORDS.split(), round(4 * 16 ** draw.random()))
            yield " ".join(words).encode()


def _make_scan(draw: np.random.Generator, side: int) -> bytes:
    """A compressed NIfTI-1 file of 16-bit voxels of 1 mm, by the layout of its header: nibabel need not be here."""
    greys = draw.integers(0, 1000, (-(-side // 8),) * 3, dtype=np.int16)
    for axis in range(3):
        greys = greys.repeat(8, axis)
    voxels = greys[:side, :side, :side] + draw.integers(0, 100, (side,) * 3, dtype=np.int16)
    header = np.zeros(1, NIFTI)[0]
    header["sizeof_hdr"] = NIFTI.itemsize
    header["dim"] = (3, side, side, side, 1, 1, 1, 1)
    header["datatype"], header["bitpix"] = 4, 16  # signed, 16 bits
    header["pixdim"] = 1
    header["xyzt_units"] = 2  # mm
    header["vox_offset"] = 352  # behind the header and four bytes that say that it has no extension
    header["magic"] = b"n+1"
    header["sform_code"], header["srow"] = 1, np.eye(3, 4)
    return gzip.compress(header.tobytes() + bytes(4) + voxels.tobytes(order="F"), compresslevel=1, mtime=0)


# What of the 348 bytes is set: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
NIFTI = np.dtype(
    {
        "names": ["sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "xyzt_units", "sform_code", "srow",
                  "magic"],
        "formats": ["<i4", ("<i2", 8), "<i2", "<i2", ("<f4", 8), "<f4", "u1", "<i2", ("<f4", (3, 4)), "S4"],
        "offsets": [0, 40, 70, 72, 76, 108, 123, 254, 280, 344],
        "itemsize": 348,
    }
)  # fmt: skip


def _find_centre(image: bytes) -> tuple[float, float]:
    """The pixel x, y in an image's middle."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        return opened.width / 2, opened.height / 2
