"""Adapter folders as nobody saved them: seeded mutations, and the judge of what loading makes of them."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from inlay.adapters import golden
from inlay.adapters.file import CONFIG, METRICS, WEIGHTS, hash_config
from inlay.adapters.load import load_adapter
from inlay.adapters.summary import summarise_adapter
from inlay.errors import InlayError
from inlay.files.tensor_header import DIGEST, sign

SECONDS = 30  # that a case may take, on a busy machine; a usual one takes 0.1
# Values that no setting expects, each at any place of a config, a record or a header.
ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e9, 1e308, float("nan"), float("inf"), "", "x",
    "../../etc/passwd", "\x1b[2J", "\ud800", "(", "(a+)+$", r"([\w.]+)*!", "a" * 20_000, "true", "LORA", [], [[]], {},
    [None], ["q_proj"], [1, 2], {"a": 1}, {"q_proj": 64}, {"(.*)*!": 1}, [[0, 4], [0, 4]], "pissa", "builtin:gpt2-tiny",
]  # fmt: skip


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one thing in a copy of a saved adapter; says which, in words that begin with how well it is hidden.

    raw: as damage or a clumsy hand leaves it. signed: by someone who writes checksums anew. plain: in a folder that
    plain peft saved, where nothing says what was.
    """
    how = draw.choice(["raw", "raw", "signed", "plain"])
    kind = draw.choice(list(_KINDS[how]))
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if how == "plain":
        header["__metadata__"].pop("inlay")
        header["__metadata__"].pop(DIGEST)
        _put(folder, header, data[end:])
    said = _KINDS[how][kind](folder, draw)
    if how == "signed":
        _resign(folder)
    return f"{how}: {kind}: {said}"


def judge(folder: Path, expected: torch.Tensor, outputs: Callable[[Any], torch.Tensor], base: Any, how: str) -> str:
    """What loading makes of a mutated folder: refused, equal, or other (of an unverified one alone).

    Raises:
        AssertionError: It hangs, fails with an error that is not ours, or loads as verified with another output.
    """
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        verdict = _judge(folder, expected, outputs, base, how)
    finally:
        signal.alarm(0)
    assert time.perf_counter() - started < SECONDS
    return verdict


def _judge(folder: Path, expected: torch.Tensor, outputs: Callable[[Any], torch.Tensor], base: Any, how: str) -> str:
    try:
        summarise_adapter(folder)
        loaded = load_adapter(folder, base() if how == "plain" else None)
    except InlayError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        return "refused"
    found = outputs(loaded.model)
    off = float((found - expected).abs().max() / expected.abs().max()) if found.shape == expected.shape else 9.0
    if off == 0:
        return "equal"
    if how == "plain":
        assert not loaded.verified
        return "other"
    # whoever signs anew may change numbers by less than the golden output shows: an adapter of their own, in effect
    assert how == "signed" and off < 2 * golden.TOLERANCE["float32"], f"loads with another output ({off:.2g})"
    return "within the tolerance"


def _late(*_: Any) -> None:
    raise AssertionError(f"not done after {SECONDS} s")


def _put(folder: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)


def _parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _resign(folder: Path) -> None:
    """As someone would who knows how: the config's fingerprint, and the checksum over it all."""
    header, body = _parts(folder)
    record = json.loads(header["__metadata__"]["inlay"])
    if isinstance(record, dict):
        record["config"] = hash_config(json.loads((folder / CONFIG).read_text()))
        header["__metadata__"]["inlay"] = json.dumps(record)
    _put(folder, header, body)
    (folder / WEIGHTS).write_bytes(sign((folder / WEIGHTS).read_bytes()))


def _somewhere(value: Any, draw: random.Random, odd: list[Any]) -> str:
    """Replace, remove, double or rename something inside a JSON value, in place."""
    path, at = [], value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return "nothing there"
        key = draw.choice(keys)
        path.append(str(key)[:60])
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.3:
            break
        at = at[key]
    way = draw.choice(["replace", "replace", "replace", "remove", "rename"])
    if way == "remove":
        del at[key]
    elif way == "rename" and isinstance(at, dict):
        at[f"{key}{draw.choice('_x. ')}"] = at.pop(key)
    else:
        at[key] = draw.choice(odd)
        path.append(repr(at[key])[:40])
    return f"{way} {'.'.join(path)}"


def _bits(folder: Path, draw: random.Random) -> str:
    name = draw.choice([WEIGHTS, WEIGHTS, WEIGHTS, CONFIG])
    data = bytearray((folder / name).read_bytes())
    places = [
        draw.randrange(min(len(data), draw.choice([8, 9000, len(data)]))) for _ in range(draw.choice([1, 1, 2, 50]))
    ]
    for place in places:
        data[place] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(data)
    return f"{name} at {places[:3]}"


def _cut(folder: Path, draw: random.Random) -> str:
    name = draw.choice([WEIGHTS, WEIGHTS, CONFIG, METRICS])
    data = (folder / name).read_bytes()
    at = draw.randrange(len(data))
    piece = draw.choice([b"", draw.randbytes(16), b"\0" * 300, data])
    (folder / name).write_bytes(draw.choice([data[:at], data[:at] + piece + data[at:], data[at:], data + piece]))
    return f"{name} at {at}"


def _length(folder: Path, draw: random.Random) -> str:
    length = draw.choice([0, 1, 2, 2**31, 2**40, 2**64 - 1, draw.randrange(20_000)])
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + (folder / WEIGHTS).read_bytes()[8:])
    return str(length)


def _header(folder: Path, draw: random.Random) -> str:
    header, body = _parts(folder)
    said = _somewhere(header, draw, ODD)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        text, said = text.replace(b'"shape"', b'"shape":[1],"shape"', 1), "a shape twice"
    _put(folder, text, body)
    return said


def _nested(folder: Path, draw: random.Random) -> str:
    depth = draw.choice([50, 5_000, 200_000])
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    if draw.random() < 0.5:
        _put(folder, text, b"")
    else:
        (folder / CONFIG).write_bytes(text)
    return str(depth)


def _config(folder: Path, draw: random.Random) -> str:
    settings = json.loads((folder / CONFIG).read_text())
    for _ in range(draw.choice([1, 1, 2])):
        said = _somewhere(settings, draw, ODD)
    if draw.random() < 0.15:
        said = draw.choice(["megatron_config", "layer_replication", "trust_remote_code", "unheard_of", "use_qalora"])
        settings[said] = draw.choice(ODD)
    if draw.random() < 0.1:
        said = settings["peft_type"] = draw.choice(
            ["LOHA", "VERA", "IA3", "XLORA", "INLAY_COMPOSITE", "INLAY_PARTIAL", "OSF"]
        )
    (folder / CONFIG).write_text(json.dumps(settings))
    return said


def _record(folder: Path, draw: random.Random) -> str:
    header, body = _parts(folder)
    record = json.loads(header["__metadata__"]["inlay"])
    said = _somewhere(record, draw, ODD)
    header["__metadata__"]["inlay"] = json.dumps(record)
    _put(folder, header, body)
    return said


def _metrics(folder: Path, draw: random.Random) -> str:
    metrics = json.loads((folder / METRICS).read_text())
    said = _somewhere(metrics, draw, ODD)
    (folder / METRICS).write_text(json.dumps(metrics))
    return said


def _tensors(folder: Path, draw: random.Random) -> str:
    header, _ = _parts(folder)
    tensors = load_file(folder / WEIGHTS)
    a, b = draw.sample(sorted(tensors), 2)
    value = tensors[a]
    way = draw.choice(
        ["nan", "zero", "scale", "half", "whole", "turn", "swap", "drop", "double", "empty", "flat", "rename"]
    )
    if way == "nan":
        value.view(-1)[draw.randrange(value.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    elif way == "swap":
        tensors[a], tensors[b] = tensors[b].clone(), value.clone()
    elif way == "drop":
        del tensors[a]
    elif way in ("double", "rename"):
        tensors[draw.choice(_NAMES)(a)] = value.clone() if way == "double" else tensors.pop(a)
    else:
        changed = {
            "zero": lambda: torch.zeros_like(value),
            "scale": lambda: value * draw.choice([1.0, 1.001, -1.0, 1e30]),
            "half": lambda: value.half(),
            "whole": lambda: value.to(draw.choice([torch.int8, torch.int64, torch.bool, torch.float64])),
            "turn": lambda: value.T.contiguous() if value.ndim == 2 else value.flip(0),
            "empty": lambda: value[:0],
            "flat": lambda: value.reshape(-1),
        }
        tensors[a] = changed[way]()
    (folder / WEIGHTS).write_bytes(save(tensors, header["__metadata__"]))
    return f"{way} {a}"


_NAMES = [
    lambda key: key.replace("lora_A", "lora_B"),
    lambda key: key.replace(".lora_A", ".base_layer"),
    lambda key: key.replace("base_model.model.", ""),
    lambda key: key.replace("weight", "default.weight"),
    lambda key: f"{key}.weight",
    lambda key: f"../{key}",
    lambda key: "base_model.model.vit.embeddings.cls_token",
    lambda key: "ключ",
]


def _files(folder: Path, draw: random.Random) -> str:
    name = draw.choice([CONFIG, WEIGHTS, METRICS])
    path, data = folder / name, (folder / name).read_bytes()
    way = draw.choice(
        ["gone", "empty", "folder", "pipe", "link", "lfs", "pickle", "utf-16", "bom", "sparse", "other", "text"]
    )
    if way in ("gone", "folder", "pipe", "link"):
        path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "link":
        path.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", name, "../nowhere", "/proc/self/mem"]))
    elif way == "sparse":
        os.truncate(path, draw.choice([10**7, 10**10, 10**11]))
    elif way != "gone":
        path.write_bytes(
            {
                "empty": b"",
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
                "pickle": pickle.dumps([1] * 99, protocol=draw.choice([0, 2, 4, 5])),
                "utf-16": data[:200].decode("latin-1").encode("utf-16"),
                "bom": b"\xef\xbb\xbf" + data,
                "other": (folder / draw.choice([CONFIG, WEIGHTS, METRICS])).read_bytes(),
                "text": b"<html>404</html>" * 20,
            }[way]
        )
    return f"{way} {name}"


_ANY = {"config": _config, "config again": _config, "tensors": _tensors, "metrics": _metrics}
_KINDS: dict[str, dict[str, Callable[[Path, random.Random], str]]] = {
    "raw": {
        "bits": _bits,
        "cut": _cut,
        "length": _length,
        "header": _header,
        "nested": _nested,
        "files": _files,
        **_ANY,
    },
    "signed": {"record": _record, "record again": _record, **_ANY},
    "plain": {"bits": _bits, "header": _header, "files": _files, **_ANY},
}


def run(seed: int, saved: Path, work: Path, expected: Any, outputs: Any, base: Any) -> tuple[str, str]:
    """One case by its seed: what was changed, and what became of it."""
    draw = random.Random(seed)
    folder = work / f"case{seed}"
    shutil.copytree(saved, folder)
    try:
        said = mutate(folder, draw)
        try:
            return said, judge(folder, expected, outputs, base, said.split(":")[0])
        except BaseException as error:
            raise AssertionError(f"case {seed} ({said}): {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
