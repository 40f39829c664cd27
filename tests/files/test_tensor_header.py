"""The digest in a safetensors file: what it covers, in new files and in older ones, and what reading with it finds."""

import hashlib
import json

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load, save

from inlay.combine.parts import Tensors
from inlay.errors import DamagedFile
from inlay.files import tensor_header
from inlay.files.tensor_header import read_header, sign

TENSORS = {f"base_model.model.{name}": np.full((5, 8), i + 0.5, np.float32) for i, name in enumerate("abc")}
PLAIN = save(TENSORS, {"format": "pt", "inlay": "{}"})


def split(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def sign_by_formula(data, key, new):
    """The digest of a header, as JSON with sorted keys, and of all tensors, as hashlib and xxhash give it."""
    header, body = split(data)
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    header["__metadata__"][key] = new(canonical + body).hexdigest()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


SIGNED = {
    "new": sign(PLAIN),
    "new, by its formula": sign_by_formula(PLAIN, "inlay_xxh3_128", xxhash.xxh3_128),
    "older": sign_by_formula(PLAIN, "inlay_sha256", hashlib.sha256),
}


@pytest.mark.parametrize("data", SIGNED.values(), ids=SIGNED)
def test_files_new_and_old_are_read_and_a_changed_byte_is_found(data, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    assert read_header(path)["__metadata__"]["format"] == "pt"
    np.testing.assert_equal(load(path.read_bytes()), TENSORS)
    for place in (data.index(b'"pt"') + 1, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DamagedFile, match="does not match the checksum"):
            read_header(path)


def test_signing_is_the_formula():
    assert split(SIGNED["new"]) == split(SIGNED["new, by its formula"])


@pytest.mark.parametrize("order", ["abc", "cab", "b", "", "aacb"])
@pytest.mark.parametrize("data", SIGNED.values(), ids=SIGNED)
def test_tensors_read_in_any_order_are_hashed_once(data, order, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_header, "PIECE", 48)
    path = tmp_path / "adapter_model.safetensors"
    for place in (None, len(data) - 1, len(data) - 480):  # of the last tensor, of the first
        broken = bytearray(data)
        if place is not None:
            broken[place] ^= 4
        path.write_bytes(broken)
        tensors = Tensors(path, read_header(path, digest=False))
        for name in order:
            found = tensors.read(f"base_model.model.{name}")
            if place is None:
                np.testing.assert_equal(found, TENSORS[f"base_model.model.{name}"])
        if place is None:
            tensors.check_digest(), tensors.check_digest()
        else:
            with pytest.raises(DamagedFile, match="does not match the checksum"):
                tensors.check_digest()
        tensors.close()


def test_bytes_that_were_read_in_order_are_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(SIGNED["new"])
    tensors, counted = Tensors(path, read_header(path, digest=False)), []
    monkeypatch.setattr(tensor_header.BodyDigest, "_read_until", lambda self, end: counted.append(end - self._at))
    for name in "abc":
        tensors.read(f"base_model.model.{name}")
    tensors.check_digest()
    tensors.close()
    assert counted == [0], "only the end is asked for, and nothing stands before it"


def test_files_without_a_digest_have_nothing_to_compare(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(save(TENSORS, {"format": "pt"}))
    tensors = Tensors(path, read_header(path, digest=False))
    tensors.check_digest()
    tensors.close()
    path.write_bytes(PLAIN)
    with pytest.raises(DamagedFile, match="its checksum is gone"):
        read_header(path)


DESCRIBED = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "wrong",
    [
        *({k: v for k, v in DESCRIBED.items() if k != missing} for missing in DESCRIBED),
        *({**DESCRIBED, "dtype": dtype} for dtype in ("F31", 32, ["F32"])),
        *({**DESCRIBED, "shape": shape} for shape in ({}, "22", 4, [2, -2], [2, 2.0], [2, True], [1] * 9, None)),
        *({**DESCRIBED, "data_offsets": offsets} for offsets in ([0], [0, 8, 16], {"0": 16}, 16, [0, 16.0], "16")),
        [0, 16],
        None,
    ],
    ids=json.dumps,
)
def test_a_header_that_does_not_describe_its_tensor_is_refused(wrong, tmp_path):
    text = json.dumps({"a": wrong}).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(DamagedFile, match="does not describe the tensor 'a'"):
        read_header(path)


def test_a_file_is_read_by_the_header_that_was_checked(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(save({"a": np.zeros((2, 3), np.float32)}))
    tensors = Tensors(path, read_header(path))
    assert tensors.shape("a") == (2, 3)
    path.write_bytes(save({"a": np.zeros(2, np.float32)}))  # by another process, between the check and the reading
    with pytest.raises(DamagedFile, match="cut short"):
        tensors.read("a")
    tensors.close()
