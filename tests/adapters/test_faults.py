"""Every fault in an adapter folder gives one clear sentence: never a wrong result, never a foreign traceback."""

import json
import pickle
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save

from inlay.adapters.file import CONFIG, METRICS, WEIGHTS, read_adapter
from inlay.adapters.load import load_adapter
from inlay.errors import InlayError
from inlay.files.tensor_header import DIGEST

KEY = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"
HEAD = "base_model.model.classifier.weight"


def refused(folder, message, **options):
    """The one sentence that loading gives; reading gives the same where it can know."""
    with pytest.raises(InlayError, match=message) as caught:
        load_adapter(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and "Traceback" not in text
    return text


def header_of(folder):
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def put(folder, header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + body)
    return folder


# the ten faults


def test_a_flipped_bit_anywhere(zoo, original, outputs):
    data = (zoo / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    meta = data.index(b"__metadata__")
    draw = random.Random(5)
    places = [*range(8), *(draw.randrange(8, end) for _ in range(22)), meta, meta + 5, data.index(b'"inlay"') + 2]
    places += [data.index(DIGEST.encode()) + 3, data.index(b"data_offsets"), data.index(b"golden"), end - 1]
    places += [end, len(data) - 1, *(draw.randrange(end, len(data)) for _ in range(26))]
    expected = outputs(original[0])
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << draw.randrange(8)
        (zoo / WEIGHTS).write_bytes(broken)
        try:
            found = outputs(load_adapter(zoo).model)
        except InlayError as error:
            assert "download it again" in str(error) and "\n" not in str(error), place
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=f"byte {place}")


def test_a_flipped_bit_in_the_config(zoo, original, outputs):
    data, draw = (zoo / CONFIG).read_bytes(), random.Random(6)
    for place in draw.sample(range(len(data)), 40):
        broken = bytearray(data)
        broken[place] ^= 1 << draw.randrange(8)
        (zoo / CONFIG).write_bytes(broken)
        try:
            found = outputs(load_adapter(zoo).model)
        except InlayError as error:
            assert "\n" not in str(error), place
        else:
            torch.testing.assert_close(found, outputs(original[0]), rtol=0, atol=0, msg=f"byte {place}")


def test_truncated_at_any_length(zoo):
    data = (zoo / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for length in (1, 4, 7, 8, 9, 100, end - 1, end, end + 1, len(data) // 2, len(data) - 4, len(data) - 1):
        (zoo / WEIGHTS).write_bytes(data[:length])
        refused(zoo, r"truncated.*download it again\.")
    (zoo / WEIGHTS).write_bytes(data + b"\0")
    refused(zoo, r"truncated: its tensors need \d+ bytes, but it has \d+; download it again\.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_under_a_right_checksum(value, zoo, rewrite):
    rewrite(zoo, weights=lambda t: t[KEY].view(-1).__setitem__(3, value))
    refused(zoo, rf"the tensor '{KEY}' of adapter 'zoo' holds NaN or Inf; it cannot be used")


def test_swapped_base(zoo, swapped_base):
    refused(
        zoo, r"was trained on builtin:vit-tiny, but this base has other weights of the same shape", base=swapped_base
    )


@pytest.mark.parametrize("signed", [True, False])
def test_missing_head(signed, zoo, rewrite, plain):
    if signed:
        rewrite(zoo, weights=lambda t: t.pop(HEAD))
        refused(zoo, r"adapter 'zoo' lacks its head 'classifier' \(1 tensors missing\); download it again")
    else:
        plain(zoo)
        tensors = {k: v for k, v in load_file(zoo / WEIGHTS).items() if "classifier" not in k}
        (zoo / WEIGHTS).write_bytes(save(tensors))
        refused(zoo, r"lacks 2 tensors \(base_model.model.classifier.bias\)")


def test_renamed_key(zoo, rewrite):
    rewrite(zoo, weights=lambda t: t.__setitem__(KEY.replace("q_proj", "query"), t.pop(KEY)))
    refused(zoo, r"it lacks 1 tensors \(.*q_proj.*\) and has 1 that no module takes \(.*query.*\)")


def test_a_key_that_would_overwrite_the_base(zoo, rewrite):
    key = "base_model.model.vit.embeddings.cls_token"
    rewrite(zoo, weights=lambda t: t.__setitem__(key, torch.ones(1, 1, 96)))
    refused(zoo, rf"it has 1 that no module takes \({key}\)")


def test_wrong_rank_in_the_config(zoo, rewrite):
    settings = json.loads((zoo / CONFIG).read_text())
    (zoo / CONFIG).write_text(json.dumps({**settings, "r": 8}))
    refused(
        zoo, r"adapter_config.json is not what was saved with the weights; download it again, or save the adapter again"
    )
    rewrite(zoo, config=lambda c: c.update(r=8))
    refused(zoo, r"lora_A.weight should be \(8, 96\), the file has \(4, 96\)")


def test_a_huge_rank_fails_fast_and_allocates_nothing(zoo, rewrite):
    rewrite(zoo, config=lambda c: c.update(r=2_000_000))
    started = time.process_time()
    refused(zoo, r"lora_A.weight should be \(2000000, 96\), the file has \(4, 96\)")
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../../b", "/etc/passwd", "..\\..\\b", "a\0b"])
def test_path_traversal_in_a_tensor_name(name, zoo, rewrite):
    rewrite(zoo, weights=lambda t: t.__setitem__(name, t.pop(KEY)))
    refused(zoo, r"is damaged: the tensor name '.*' is a path; download it again")


@pytest.mark.parametrize(
    "base", ["builtin:../..", "builtin:../../../../etc", "builtin:", "builtin:vit-tiny/../vit-tiny"]
)
def test_path_traversal_in_the_name_of_the_base(base, zoo, rewrite):
    rewrite(zoo, record=lambda r: r["base"].update(name=base))
    refused(zoo, r"unknown embedded model 'builtin:.*'; choose one of .*builtin:vit-tiny")


@pytest.mark.parametrize("base", ["../..", "/etc", "../../etc/passwd"])
def test_a_base_elsewhere_on_the_disk(base, zoo, rewrite):
    rewrite(zoo, record=lambda r: r["base"].update(name=base))
    refused(zoo, r"has neither config.json nor model_index.json, so it is no model|no model folder at")


@pytest.mark.parametrize("length", [100 * 1000**3, 2**64 - 1, 2**63, 100_000_001])
def test_a_header_of_100_gb(length, zoo):
    data = (zoo / WEIGHTS).read_bytes()
    (zoo / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(zoo, rf"its header claims {length} bytes, the file has {len(data)}; download it again")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "torch zip", "torch legacy"])
def test_pickle_in_place_of_safetensors(kind, zoo):
    path = zoo / WEIGHTS
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps([Bomb()] * 9, protocol=int(kind[-1])))
    else:
        torch.save({"bomb": Bomb()}, path, _use_new_zipfile_serialization=kind == "torch zip")
    refused(zoo, r"is a pickle, not safetensors; inlay never opens pickles: save the adapter again")


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length, zoo, plain):
    """640 bytes are b"\\x80\\x02": the first bytes of a pickle."""
    plain(zoo)
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    put(zoo, text.ljust(length), b"\0" * 4)
    assert read_adapter(zoo).shapes == {"a": (1,)}


# what else can be wrong with the files


def test_a_pickle_beside_no_safetensors(zoo):
    (zoo / WEIGHTS).rename(zoo / "adapter_model.bin")
    refused(zoo, r"has no adapter_model.safetensors \(adapter_model.bin is a pickle, which loading never opens")


def test_an_lfs_pointer(zoo):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 42956\n"
    (zoo / WEIGHTS).write_text(text)
    refused(zoo, r"is a Git LFS pointer, not the weights: run `git lfs pull`")


def test_missing_and_empty_files(zoo, tmp_path):
    (zoo / WEIGHTS).write_bytes(b"")
    refused(zoo, r"adapter_model.safetensors is empty; download it again")
    (zoo / WEIGHTS).unlink()
    refused(zoo, r"has no adapter_model.safetensors; save the adapter again as safetensors")
    (zoo / CONFIG).unlink()
    refused(zoo, r"is not an adapter: it has no adapter_config.json; give the folder that")
    refused(tmp_path / "nowhere", r"nowhere does not exist; give the folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"file is a file; give the folder")


def test_a_hub_id_without_a_network():
    refused("someone/adapter", r"there is no folder 'someone/adapter' here, and as a Hub id it fails")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not readable as JSON"),
        (b"{", "is not readable as JSON"),
        (b"\xff\xfe{}", "is not readable as JSON"),
        (b"[" * 100_000, "is not readable as JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
        (b"{}", "names no peft_type"),
        (b'{"peft_type": 5}', "names no peft_type"),
    ],
)
def test_a_config_that_is_none(text, message, zoo):
    (zoo / CONFIG).write_bytes(text)
    refused(zoo, rf"adapter_config.json.* {message}")


def test_metrics_that_are_no_json(zoo):
    (zoo / METRICS).write_text("{")
    refused(zoo, r"metrics.json is not readable as JSON")


@pytest.mark.parametrize("signed", [True, False])
def test_an_unknown_method(signed, zoo, rewrite, plain):
    (rewrite if signed else plain)(zoo, **({"config" if signed else "change": lambda c: c.update(peft_type="MAGIC")}))
    refused(zoo, r"of the method 'MAGIC', which neither this inlay nor this peft knows: upgrade them")


def test_a_newer_format(zoo, rewrite):
    rewrite(zoo, record=lambda r: r.update(format=2))
    refused(zoo, r"was saved in format 2, this inlay reads up to 1: pip install --upgrade inlay")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("base"), "lacks base"),
        (lambda r: r.update(labels="cat"), "lacks labels"),
        (lambda r: r["base"].pop("sketch"), "lacks sketch"),
        (lambda r: r.pop("config"), "lacks config"),
        (lambda r: r.update(format="1"), "cannot be read"),
        (lambda r: r.pop("format"), "cannot be read"),
        (lambda r: r["preprocessing"].update(image_processor_type="Evil"), "unknown image processor 'Evil'"),
        (lambda r: r["preprocessing"].update(size="huge"), "does not take these settings"),
        (lambda r: r.update(golden=[float("nan")] * 5), "its output differs"),
        (lambda r: r["labels"].append("yak"), r"classifier.bias should be \(6,\), the file has \(5,\)"),
    ],
)
def test_a_record_that_is_not_ours(change, message, zoo, rewrite):
    rewrite(zoo, record=change)
    refused(zoo, message)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":1' + b"," * 20, "is damaged"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is damaged"),
        (
            json.dumps({"a": ENTRY})[:-1].encode() + b"," + json.dumps({"a": ENTRY})[1:].encode(),
            "names a tensor or a setting twice",
        ),
        ({"a": ENTRY, "b": ENTRY}, "overlap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "overlap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, "leave bytes unused"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "does not fill its bytes"),
        ({"a": {**ENTRY, "shape": [3]}}, "does not fill its bytes"),
        ({"a": {**ENTRY, "shape": [-2]}}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "shape": ["2"]}}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "dtype": "F99"}}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "does not describe the tensor 'a'"),
        ({"a": {"dtype": "F32"}}, "does not describe the tensor 'a'"),
        ({"a": 5}, "does not describe the tensor 'a'"),
        ({"a": {**ENTRY, "data_offsets": [0, 1e999]}}, "does not describe the tensor 'a'"),
        (b'{"a":' + b"9" * 6000 + b"}", "is damaged"),
        ({"a": ENTRY, "__metadata__": {"x": 1}}, "metadata does not map names to texts"),
        ({"a": ENTRY, "__metadata__": 1}, "metadata does not map names to texts"),
        (b"[1, 2, 3]", "is damaged"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "is a path|is damaged"),
    ],
)
def test_a_header_that_is_none(header, message, zoo, plain):
    plain(zoo)
    size = 12 if isinstance(header, dict) and "[4, 12]" in json.dumps(header) else 8
    put(zoo, header, b"\0" * (20 if isinstance(header, dict) and "[12, 20]" in json.dumps(header) else size))
    refused(zoo, message)


# the config, where no record of inlay guards it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, r"should be \(8, 96\), the file has \(4, 96\)"),
        ({"r": 2_000_000}, r"should be \(2000000, 96\)"),
        ({"r": -1}, "does not fit this base"),
        ({"r": "4"}, "does not fit this base"),
        ({"r": None}, "does not fit this base"),
        ({"target_modules": ["nothing_here"]}, "does not fit this base"),
        ({"target_modules": "("}, "does not fit this base"),
        ({"target_modules": 5}, "target_modules must be a text or a list of texts"),
        ({"target_modules": ["layernorm"]}, "does not fit this base"),
        ({"lora_dropout": 7}, "does not fit this base"),
        ({"use_dora": True}, "lacks 24 tensors"),
        ({"modules_to_save": None}, "has 2 that no module takes"),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base at each load"),
        ({"init_lora_weights": "olora"}, "initialised by 'olora', which changes the base at each load"),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
            "sets bias, .*, target_modules, which this peft does not know in PREFIX_TUNING",
        ),
        ({"peft_type": "IA3"}, "which this peft does not know in IA3"),
    ],
)
def test_a_plain_config_that_does_not_fit(settings, message, zoo, plain, five):
    before = {key: value.clone() for key, value in five.state_dict().items()}
    refused(plain(zoo, lambda config: config.update(settings)), message, base=five)
    after = five.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_a_copy_of_the_folder_under_another_name_is_the_same_adapter(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "elsewhere")
    assert load_adapter(tmp_path / "elsewhere").verified
