"""Requests as no client should send them, by a seed, and what a server makes of them."""

import base64
import gzip
import http.client
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import nibabel
import numpy as np
from PIL import Image

Kind = Literal["image", "prompt", "scan"]
SECONDS = 30  # that an answer may take on a busy machine; a usual one takes 0.01
# Values that no field expects.
ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", " ",
    "../../etc/passwd", "/etc/passwd", "\x00", "\x1b[2J", "\ud800", "\u202e", "é" * 300, "a" * 50_000, "/a" * 20_000,
    [], [[]], {}, [None], ["a"], [0] * 1000, {"a": 1}, {"": {}}, [["a"], 1], "data:image/png;base64,aGk=",
]  # fmt: skip
KINDS = [
    "application/json",
    "text/plain",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "",
    "\xff",
    "a" * 3000,
]
KINDS += [
    "application/x-www-form-urlencoded",
    "application/json; charset=utf-16",
    "image/png",
    "multipart/mixed; boundary=x",
]


@dataclass
class Attempt:
    """A request.

    Attributes:
        what: In words.
        raw: All bytes that are sent, in place of the other fields.
    """

    what: str
    target: str = "/v1/classify"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    method: str = "POST"
    raw: bytes = b""

    def to_bytes(self) -> bytes:
        """As HTTP/1.1 has it; the length is added unless a header says otherwise."""
        if self.raw:
            return self.raw
        headers = {"host": "x", **self.headers}
        if not {"content-length", "transfer-encoding"} & {name.lower() for name in headers}:
            headers["content-length"] = str(len(self.body))
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + self.body


def make_attempt(seed: int, adapters: list[str], kind: Kind = "image") -> Attempt:
    """One request to a server of that kind; the same for a seed."""
    draw = random.Random(seed)
    attempt = draw.choice(FAMILIES[kind])(draw, draw.choice(adapters))
    attempt.what = f"{seed}: {attempt.what}"
    return attempt


def send(address: tuple[str, int], attempt: Attempt) -> int | None:
    """The status of the answer; None where the server closed the connection, or we did.

    Raises:
        TimeoutError: The server neither answers nor closes.
    """
    with socket.create_connection(address, timeout=SECONDS) as connection:
        try:
            connection.sendall(attempt.to_bytes())
            if attempt.what.endswith("leaves"):
                return None
            if attempt.what.endswith("half closed"):
                connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection, method=attempt.method)
            response.begin()
            response.read()
            return response.status
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):  # what it said before it closed is lost
            return None


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut, changed, doubled or with something put in."""
    if not data:
        return b"\xff"
    place = draw.randrange(len(data))
    end = min(len(data), place + draw.choice([1, 4, 100]))
    return draw.choice([
        lambda: data[:place],
        lambda: data[place:],
        lambda: data[:place] + draw.randbytes(end - place) + data[end:],
        lambda: data[:place] + data[end:],
        lambda: data[:place] + data[place:end] * draw.choice([2, 50]) + data[end:],
        lambda: data[:place] + draw.choice([b"\x00", b"\xff\xfe", b"\r\n\r\n", b'"', b"{", b"[" * 9999]) + data[place:],
    ])()  # fmt: skip


def make_image(draw: random.Random) -> bytes:
    """A whole one, of one of several formats."""
    side = draw.choice([1, 3, 32, 70])
    kind = draw.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
    mode = draw.choice(["RGB", "RGB", "L"] + (["RGBA", "P", "1"] if kind in ("PNG", "GIF") else []))
    values = np.random.default_rng(draw.randrange(99)).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind)
    return file.getvalue()


def make_bomb(draw: random.Random) -> tuple[str, bytes]:
    """A small file that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *more: bytes, data: bytes = b"", colour: int = 2) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(30_000_000), 9)
    return draw.choice([
        lambda: ("of 60,000 x 60,000 pixels", png(60_000, 60_000, data=zeros)),
        lambda: ("of 2^31 pixels a side", png(2**31 - 1, 2**31 - 1)),
        lambda: ("of no pixels", png(0, 0)),
        lambda: ("of one column", png(1, 1_000_000, data=zlib.compress(bytes(4_000_000), 9))),
        lambda: ("of one row", png(4_000_000, 1, data=zlib.compress(bytes(12_000_001), 9))),
        lambda: ("with 30 MB of text", png(8, 8, chunk(b"zTXt", b"k\x00\x00" + zeros), data=zeros)),
        lambda: ("with a profile of 30 MB", png(8, 8, chunk(b"iCCP", b"k\x00\x00" + zeros), data=zeros)),
        lambda: ("a GIF of 65,535 x 65,535", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(50)),
        lambda: ("a BMP of 2^31 rows", b"BM" + bytes(16) + struct.pack("<IiiHHI", 40, 9, 2**31 - 1, 1, 24, 0)),
        lambda: ("a PPM of 10^5 x 10^5", b"P6 100000 100000 255\n" + bytes(99)),
        lambda: ("an EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\nshowpage\n"),
    ])()  # fmt: skip


def _form(name: str, image: bytes, boundary: bytes = b"x") -> bytes:
    return (
        b"--%s\r\ncontent-disposition: form-data; name=model\r\n\r\n%s\r\n"
        b'--%s\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n'
        b"content-type: image/png\r\n\r\n%s\r\n--%s--\r\n"
    ) % (boundary, name.encode(), boundary, image, boundary)


FORM = {"content-type": "multipart/form-data; boundary=x"}


def _json(draw: random.Random, name: str) -> Attempt:
    given: Any = {"model": name, "image": base64.b64encode(make_image(draw)).decode()}
    match draw.randrange(5):
        case 0:
            return Attempt("JSON with changed bytes", body=mutate_bytes(json.dumps(given).encode(), draw))
        case 1:
            given[draw.choice(["model", *TENSORS, ""])] = draw.choice([*ODD, [[1, 2]], [3], 4])
        case 2:
            given = draw.choice(ODD)
        case 3:
            given = {draw.choice(["model", "image", "x" * 10_000, "\ud800"]): draw.choice(ODD) for _ in range(3)}
        case 4:
            return Attempt("deep JSON", body=draw.choice([b"[", b'{"a":', b'[{"model":']) * draw.choice([100, 100_000]))
    return Attempt("odd JSON", body=json.dumps(given).encode())


def _base64(draw: random.Random, name: str) -> Attempt:
    text = base64.b64encode(make_image(draw))
    text = draw.choice(
        [mutate_bytes(text, draw), text[:-1], text + b"====", b"data:image/png;base64," + text, b"\n" + text]
    )
    return Attempt("odd base64", body=json.dumps({"model": name, "image": text.decode("latin-1")}).encode())


def _image(draw: random.Random, name: str) -> Attempt:
    image = make_image(draw)
    for _ in range(draw.choice([1, 1, 5])):
        image = mutate_bytes(image, draw)
    return Attempt("a damaged image", body=_form(name, image), headers=FORM)


def _bomb(draw: random.Random, name: str) -> Attempt:
    what, image = make_bomb(draw)
    return Attempt(f"an image {what}", body=_form(name, image), headers=FORM)


def _multipart(draw: random.Random, name: str) -> Attempt:
    form = _form(name, make_image(draw))
    body = draw.choice([
        lambda: mutate_bytes(form, draw),
        lambda: b"",
        lambda: b"--x--\r\n",
        lambda: b"--x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n\r\n--x--\r\n",
        lambda: b"--x\r\ncontent-disposition: form-data; name=model\r\n\r\n\r\n" * 3000 + b"--x--\r\n",
        lambda: b"--x\r\ncontent-disposition: form-data; name=image; filename=a\r\n\r\na\r\n" * 3000 + b"--x--\r\n",
        lambda: b"--x\r\ncontent-disposition: form-data\r\n\r\na\r\n--x--\r\n",
        lambda: b"--x\r\ncontent-disposition: form-data; name=model; filename=\xff\r\n\r\n\xff\r\n--x--\r\n",
        lambda: b"--x\r\ncontent-disposition: form-data; name=" + b"m" * 50_000 + b"\r\n\r\na\r\n--x--\r\n",
        lambda: _form(name, b"", b"y"),
        lambda: _form(name, b"a" * 3_000_000),  # more than what is held in memory
    ])()  # fmt: skip
    return Attempt("an odd form", body=body, headers=FORM)


def _content_type(draw: random.Random, name: str) -> Attempt:
    body = draw.choice(
        [_form(name, make_image(draw)), b"model=a&image=b", b'{"model": "a"}', b"\xff" * 100, b"a=b&" * 5000]
    )
    return Attempt("another type of content", body=body, headers={"content-type": draw.choice(KINDS)})


def _headers(draw: random.Random, name: str) -> Attempt:
    body = json.dumps({"model": name, "image": ""}).encode()
    headers = draw.choice([
        {"x": "a" * draw.choice([10_000, 1_000_000])},
        {f"x{i}": "a" for i in range(5000)},
        {"authorization": draw.choice(["", "Bearer", "Bearer \xff", "Basic " + "a" * 5000])},
        {"content-length": draw.choice(["-1", "99999999999999999999999", "1e3", "", " 5", "0x10", "5, 6", "9" * 11])},
        {"transfer-encoding": draw.choice(["chunked", "gzip", "chunked, chunked", "\xff"])},
        {"expect": "100-continue"},
        {"content-encoding": "gzip"},
        {"connection": "upgrade", "upgrade": draw.choice(["websocket", "h2c"])},
        {"cookie": "a=" * 3000, "referer": "\x7f"},
        {"inference-header-content-length": draw.choice(["-1", "x", "99999", ""])},
    ])  # fmt: skip
    return Attempt("odd headers, half closed", body=body, headers={"content-type": "application/json", **headers})


def _path(draw: random.Random, name: str) -> Attempt:
    target = draw.choice([
        "/v1/classify/..", "/v1/../../etc/passwd", "/%00", "/v2/models/%ff/infer", "/v2/models//infer", "//", "*",
        "/v2/models/..%2f..%2fetc/infer", "/v1/classify?" + "a=b&" * 5000, "/docs", "/openapi.json", "/v1/models/",
        f"/v2/models/{name}", f"/v2/models/{name}/versions/9/infer", "/metrics", "/static/../app.py",
        "http://other/v1/classify", "/" + "a" * 60_000,
    ])  # fmt: skip
    method = draw.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "BREW", "CONNECT"])
    return Attempt("an odd path or method", target, b"{}", method=method)


def _raw(draw: random.Random, name: str) -> Attempt:
    good = Attempt("", body=_form(name, make_image(draw)), headers=FORM).to_bytes()
    what, raw = draw.choice([
        ("no HTTP, half closed", draw.randbytes(draw.choice([1, 200, 100_000]))),
        ("TLS, half closed", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(300)),
        ("HTTP/2, half closed", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
        ("a request cut off, which leaves", good[: draw.randrange(1, len(good))]),
        ("a request cut off, half closed", good[: draw.randrange(1, len(good))]),
        ("a whole request that leaves", good),
        ("two requests in one, half closed", good + mutate_bytes(good, draw)),
        ("changed bytes, half closed", mutate_bytes(good, draw)),
        ("odd chunks, half closed", b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            + draw.choice([b"-1\r\na\r\n", b"zz\r\n", b"f" * 15 + b"\r\na", b"1\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n"])),
    ])  # fmt: skip
    return Attempt(what, raw=raw)


def _completion(draw: random.Random, name: str) -> Attempt:
    given: dict[str, Any] = {"model": name, "prompt": draw.choice(["name[Aromi]", "", "a" * 3000, ["a", "b"], [1, 2]])}
    given |= {"max_tokens": draw.choice([1, 3]), "temperature": 0}
    return _change_fields(draw, "/v1/completions", given, ["prompt", *GENERATION])


def _chat(draw: random.Random, name: str) -> Attempt:
    message: Any = {"role": "user", "content": "name[Aromi]"}
    for _ in range(draw.choice([0, 1])):
        message = draw.choice([draw.choice(ODD), {**message, draw.choice(["role", "content", "x"]): draw.choice(ODD)}])
    given = {"model": name, "messages": draw.choice([[message], [message] * 50, message, []]), "max_tokens": 2}
    return _change_fields(draw, "/v1/chat/completions", given, ["messages", *GENERATION])


GENERATION = [
    "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "stream_options", "logprobs",
    "echo", "logit_bias", "best_of", "suffix", "user", "tools", "response_format", "frequency_penalty",
]  # fmt: skip


def _change_fields(draw: random.Random, target: str, given: dict[str, Any], fields: list[str]) -> Attempt:
    for field_name in draw.sample(fields, draw.choice([1, 1, 2])):
        given[field_name] = draw.choice([*ODD, 2, 0.7, True, ["a"], {"include_usage": True}])
    body = json.dumps(given).encode()
    if draw.random() < 0.2:
        body = mutate_bytes(body, draw)
    what = f"{target} with {', '.join(given)}"
    return Attempt(what + (", which leaves" if draw.random() < 0.1 else ""), target, body)


TENSORS = ["image", "pixels", "pixel_values", "text", "pair", "prompt", "max_tokens", "group", "top", "scan", "points"]
TENSORS += ["labels", "boxes", "point_labels", "box_labels", "largest", "flips", "keep_probabilities", "input_ids"]


def _infer(draw: random.Random, name: str) -> Attempt:
    """The Open Inference Protocol: tensors in JSON and behind it."""
    data = draw.choice([make_image(draw), b"", bytes(12), b"name[Aromi]"])
    data = draw.choice([data, len(data).to_bytes(4, "little") + data, b"\xff\xff\xff\xff" + data, b"\x00" + data])
    shape = draw.choice([[1], [2], [-1], [0], [1, 1], [], [3, 4, 1], [2**40, 2**40], "1", None, [1.5], [10**30]])
    size = draw.choice([len(data), len(data) + 1, len(data) - 1, 0, -1, 2**63, 10**30, "5", None, 1.5, True])
    tensor: dict[str, Any] = {
        "name": draw.choice([*TENSORS, "", "x", None]),
        "datatype": draw.choice(["BYTES", "UINT8", "FP32", "INT64", "BOOL", "FP64", "FP16", "X", "", None, 1]),
        "shape": shape,
    }
    if draw.random() < 0.6:
        tensor["parameters"] = draw.choice([{"binary_data_size": size}, {"binary_data_size": size}, {}, [], None, 1])
    else:
        values = [
            [1, 2, 3],
            ["aGk="],
            ["a"] * 9,
            [[[0] * 3] * 4] * 2,
            [None],
            {},
            "a",
            [[1], [2, 3]],
            [1e400],
            [10**40],
        ]
        tensor["data"], data = draw.choice([*values, *ODD]), b""
    tensors = draw.choice([[tensor], [tensor, tensor], tensor, [], [None], [[tensor]]])
    given = {"inputs": tensors, "id": draw.choice(["1", 1, None, "a" * 9999])}
    given["outputs"] = draw.choice([[], [{"name": "logits"}], [{"name": "x"}], [{}], {}, [1], None, ["label"]])
    given["parameters"] = draw.choice([{}, {"binary_data_output": draw.choice([True, 1, "x"])}, [], None])
    for field_name in draw.sample(list(given), draw.choice([0, 1, 2])):
        del given[field_name]
    header = json.dumps(given).encode()
    length = draw.choice([len(header), len(header), len(header), len(header) - 1, 0, -1, 10**9, "x"])
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(length)}
    if not data:
        headers = draw.choice([headers, {"content-type": "application/json"}])
    return Attempt("odd tensors", f"/v2/models/{name}/infer", header + data, headers)


def _loading(draw: random.Random, name: str) -> Attempt:
    paths = [
        "..",
        "/etc",
        "\x00",
        "a" * 5000,
        "../" * 50,
        ".",
        "",
        "~",
        "user/x",
        "//x",
        "version0/../..",
        None,
        3,
        [],
        {},
    ]
    given = {
        "lora_name": draw.choice([name, "new", *ODD]),
        "lora_path": draw.choice(paths),
        "load_inplace": draw.choice(ODD),
    }
    target = draw.choice(["/v1/load_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
    if target == "/v1/unload_lora_adapter" and given["lora_name"] == name:
        given["lora_name"] = "nobody"  # whom others ask
    body = json.dumps(given).encode()
    return Attempt("odd loading", target, mutate_bytes(body, draw) if draw.random() < 0.2 else body)


_ANY = [_content_type, _headers, _path, _raw, _infer, _loading]


def make_scan(draw: random.Random) -> bytes:
    """A whole one: NIfTI-1 or 2, NRRD, MetaImage or MGH, compressed or not; or an .npz, which is none.

    It is of one of several types and shapes.
    """
    shape = draw.choice([(1, 1, 1), (9, 8, 7), (16, 16, 9), (30, 4, 4), (6, 6, 6, 1), (6, 6, 6, 2), (8, 8)])
    voxels = np.random.default_rng(draw.randrange(99)).normal(0, 50, shape)
    voxels = voxels.astype(draw.choice([np.uint8, np.int16, np.float32, np.float64, np.complex64]))
    if draw.random() < 0.1:
        file = io.BytesIO()
        np.savez(file, image=voxels, affine=np.eye(4))
        return file.getvalue()
    affine = np.diag([draw.choice([-1, 1, 0.01, 40]), 1, 2, 1])
    if voxels.dtype.name in WRITTEN_TYPES and voxels.ndim == 3 and draw.random() < 0.5:
        return draw.choice([write_nrrd, write_metaimage, write_mgh])(voxels, draw.random() < 0.5)
    kind = draw.choice([nibabel.Nifti1Image, nibabel.Nifti2Image])
    data = kind(voxels, affine).to_bytes()
    return gzip.compress(data, 1) if draw.random() < 0.5 else data


WRITTEN_TYPES = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "float32": "MET_FLOAT"}


def write_nrrd(voxels: np.ndarray, packed: bool) -> bytes:
    """An NRRD file of voxels (X, Y, Z)."""
    data, kind = voxels.tobytes("F"), {"float32": "float"}.get(voxels.dtype.name, voxels.dtype.name)
    header = (
        f"NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: {list_sizes(voxels)}\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,2)\nendian: little\nencoding: {'gzip' if packed else 'raw'}\n"
        "space origin: (0,0,0)\n\n"
    )
    return header.encode() + (gzip.compress(data) if packed else data)


def write_metaimage(voxels: np.ndarray, packed: bool) -> bytes:
    """A MetaImage of voxels (X, Y, Z)."""
    data = voxels.tobytes("F")
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = {packed}\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 2\nDimSize = {list_sizes(voxels)}\n"
        f"ElementType = {WRITTEN_TYPES[voxels.dtype.name]}\nElementDataFile = LOCAL\n"
    )
    return header.encode() + (zlib.compress(data) if packed else data)


def write_mgh(voxels: np.ndarray, packed: bool) -> bytes:
    """An MGH file of voxels (X, Y, Z)."""
    data = nibabel.MGHImage(voxels, np.diag([1.0, 1, 2, 1])).to_bytes()
    return gzip.compress(data) if packed else data


def list_sizes(voxels: np.ndarray) -> str:
    return " ".join(map(str, voxels.shape))


def damage_scan(draw: random.Random) -> tuple[str, bytes]:
    """One with a header that lies, bytes that changed, or what is no scan at all."""
    if draw.random() < 0.5:
        scan = bytearray(nibabel.Nifti1Image(np.zeros((9, 8, 7), np.int16), np.eye(4)).to_bytes())
        place, kind = draw.choice(
            [
                (40, "h"),
                (42, "h"),
                (46, "h"),
                (48, "h"),
                (70, "h"),
                (72, "h"),
                (76, "f"),
                (80, "f"),
                (108, "f"),
                (112, "f"),
                (116, "f"),
                (123, "B"),
                (252, "h"),
                (254, "h"),
                (280, "f"),
                (300, "f"),
                (344, "I"),
                (0, "i"),
            ]
        )
        value = draw.choice([0, 1, 255]) if kind == "B" else draw.choice([-1, 0, 1, 2, 7, 8, 512, 2**15 - 1])
        if kind == "f":
            value = draw.choice([0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30, 352.0, 1e9])
        struct.pack_into("<" + kind, scan, place, abs(value) if kind == "I" else value)
        data = bytes(scan)
        return f"a header that lies at {place}", gzip.compress(data, 1) if draw.random() < 0.5 else data
    if draw.random() < 0.3:
        return draw.choice([
            lambda: ("which is a bomb", gzip.compress(bytes(50_000_000), 9)),
            lambda: ("behind whose end is a bomb", gzip.compress(make_tiny_scan() + bytes(20_000_000), 9)),
            lambda: ("which is a bomb as NRRD", write_nrrd(np.zeros((9, 8, 7), np.uint8), False)[:-504].replace(
                b"raw", b"gzip") + gzip.compress(bytes(50_000_000), 9)),
            lambda: ("which is a bomb as MetaImage", write_metaimage(np.zeros((1, 1, 1), np.uint8), True)
                     + zlib.compress(bytes(50_000_000), 9)),
            lambda: ("which is a bomb as MGH", gzip.compress(
                write_mgh(np.zeros((4, 4, 4), np.uint8), False) + bytes(50_000_000), 9)),
            lambda: ("which is empty", b""),
            lambda: ("of two members", gzip.compress(make_tiny_scan()[:300]) + gzip.compress(make_tiny_scan()[300:])),
            lambda: ("packed twice", gzip.compress(gzip.compress(make_tiny_scan()))),
            lambda: ("which is a PNG", make_image(draw)),
        ])()  # fmt: skip
    scan = make_scan(draw)
    for _ in range(draw.choice([0, 1, 1, 4])):
        scan = mutate_bytes(scan, draw)
    return "with changed bytes", scan


def make_tiny_scan() -> bytes:
    """A small NIfTI file."""
    return nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes()


PLACES = [
    [[1, 1, 1]],
    [[3, 2, 1], [4, 4, 4]],
    [[-1, 0, 0]],
    [[1e9, 1, 1]],
    [[1, 1]],
    [1, 1, 1],
    [[None, 1, 1]],
    [["1", 1, 1]],
]


def _scan(draw: random.Random, name: str) -> Attempt:
    """/v1/segment, as a form or JSON."""
    what, data = damage_scan(draw)
    fields: dict[str, Any] = {"model": name}
    for key in draw.sample(
        [
            "points", "point_labels", "boxes", "box_labels", "scribbles", "scribble_labels", "largest", "flips",
            "keep_probabilities", "x",
        ],
        draw.choice([0, 1, 2]),
    ):  # fmt: skip
        fields[key] = draw.choice([*ODD, *PLACES, True, [1], [[1, 1, 1, 4, 4, 4]], [[1, 1, 1, 0], [3, 3, 3, 0]]])
    if draw.random() < 0.3:
        given = {**fields, "scan": base64.b64encode(data).decode()}
        return Attempt(f"JSON with a scan {what}", "/v1/segment", json.dumps(given).encode())
    files = {draw.choice(["scan", "scan", "scan_flair", "mask"]): data}
    if draw.random() < 0.5:
        files[draw.choice(["scan", "scan_t1", "scan_x", "mask"])] = make_scan(draw)
    return Attempt(f"a form with {', '.join(files)} {what}", "/v1/segment", _scan_form(files, fields), FORM)


LABEL_INFO = [{"name": "foreground_scribbles", "id": 1}, {"name": "left", "id": 2}]


def _annotate(draw: random.Random, name: str) -> Attempt:
    """The routes of MONAI Label."""
    what, data = damage_scan(draw)
    params: dict[str, Any] = {"client_id": draw.choice(["me", None, 1])}
    names = ["left", "right", "background", "foreground", "label", "roi", "largest", "x", "label_info"]
    for key in draw.sample([*names, "selected_label_name", "result_extension"], draw.choice([0, 1, 3])):
        params[key] = draw.choice([*ODD, *PLACES, "left", [0, 4, 0, 4, 0, 4], LABEL_INFO, ".nrrd", ".mgz"])
    fields = {"params": draw.choice([params, params, params, *ODD])}
    infer = f"/infer/{name}"
    method, target, file = draw.choice([
        ("POST", infer, "file"), ("POST", f"{infer}_clicks", "file"), ("POST", infer, "label"), ("GET", "/info/", "x"),
        ("POST", f"{infer}?image=x&output=json", "x"), ("POST", "/infer/", "file"),
        ("POST", f"{infer}?session_id=1", "x"),
        ("POST", f"{infer}?output=%00", "file"), ("PUT", "/session/", "files"), ("PUT", "/session/", "file"),
        ("PUT", "/datastore/?image=x", "file"), ("PUT", "/datastore/label?image=x", "label"),
        ("GET", "/session/%ff", "x"), ("DELETE", "/session/x", "x"), ("GET", "/datastore/?output=x", "x"),
        ("POST", "/auth/token", "x"),
    ])  # fmt: skip
    files = {file: data, **({"label": make_scan(draw)} if draw.random() < 0.3 else {})}
    body = _scan_form(files, fields)
    if draw.random() < 0.2:
        body = mutate_bytes(body, draw)
    return Attempt(f"{method} {target} with a scan {what}", target, body, FORM, method)


def _scan_form(files: dict[str, bytes], fields: dict[str, Any]) -> bytes:
    parts = [
        b"--x\r\ncontent-disposition: form-data; name=%s\r\n\r\n%s\r\n"
        % (key.encode(), value.encode(errors="replace") if isinstance(value, str) else json.dumps(value).encode())
        for key, value in fields.items()
    ]
    parts += [
        b'--x\r\ncontent-disposition: form-data; name=%s; filename="a.nii.gz"\r\n\r\n%s\r\n' % (name.encode(), data)
        for name, data in files.items()
    ]
    return b"".join(parts) + b"--x--\r\n"


FAMILIES: dict[str, list[Callable[[random.Random, str], Attempt]]] = {
    "image": [*_ANY, _infer, _json, _base64, _image, _image, _bomb, _multipart],
    "prompt": [*_ANY, _completion, _completion, _completion, _chat, _chat],
    "scan": [*_ANY, _infer, _json, _scan, _scan, _scan, _scan, _annotate, _annotate, _annotate],
}
