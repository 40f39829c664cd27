"""What only a new process shows: what its imports do, what a terminal gets to see, and that others read our files.

A start takes longer than all that is looked at after it: each program shows several things."""

import json
import os
import pickle
import pty
import random
import subprocess
import sys
from importlib.util import find_spec

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from inlay import TextProcessor, load_base, load_images, load_processor, load_tokenizer, save_adapter
from inlay.bases.load import resolve_base
from inlay.combine.merge import merge
from inlay.methods import METHODS
from inlay.tasks.images.view import ImageView
from methods.bases import adapted, batch, build, compute, randomise

LABELS = ["cat", "dog", "emu"]
PICTURE = np.arange(3 * 32 * 32).reshape(3, 32, 32).astype("uint8")


def save_composite(folder):
    """An adapter whose method peft does not know, its base, inputs and what it computes."""
    model = adapted("mam", "vit")
    model.save_pretrained(folder / "mam")
    build("vit").save_pretrained(folder / "tiny")
    torch.save((batch("vit")["pixel_values"], compute(model, "vit").detach()), folder / "mam.pt")


def save_view(folder):
    """Two images with augmentation, and the second one as it comes after seed 5."""
    x, y = np.meshgrid(np.arange(64, dtype=np.uint8), np.arange(48, dtype=np.uint8))
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True)
        for i in range(2):
            image = Image.fromarray(np.stack([x * 4, y * 5, 0 * x], -1))
            image.save(folder / "images" / label / f"{i}.png")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    view = ImageView(load_images(str(folder / "images")).train, processor, "crop-flip")
    random.seed(5)
    (folder / "view.pickle").write_bytes(pickle.dumps((view, view[1]["pixel_values"].numpy().tobytes())))


INLAY_FIRST = """
import pickle, random, sys, warnings
from pathlib import Path

sys.modules["torchvision"] = None
warnings.simplefilter("error")
import inlay
from transformers import PreTrainedModel, AutoConfig, AutoModelForImageClassification, ViTForImageClassification

AutoModelForImageClassification.from_config(AutoConfig.for_model("squeezenet", num_labels=2))
assert "inlay.bases.pruned" not in sys.modules, "it takes seconds to import"
config = AutoConfig.for_model("vit_pruned", num_hidden_layers=2, widths={"mlp": [3, 5]}, num_labels=2)
model = AutoModelForImageClassification.from_config(config)
assert [layer.mlp.fc1.out_features for layer in model.vit.layers] == [3, 5]

warnings.filters.remove(("error", None, Warning, None, 0))  # those that inlay adds stay

import torch
from peft import LoraConfig, PeftModel, get_peft_model

torch.set_num_threads(1)
model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained("tiny"), "mam").eval()
pixels, expected = torch.load("mam.pt")
assert (model(pixel_values=pixels).logits - expected).abs().max() < 1e-5

import inlay.tasks.images.predict, inlay.tasks.masks.predict, inlay.tasks.sequences.predict
import inlay.tasks.text.generate, inlay.tasks.volumes.segment
late = {"datasets", "diffusers", "evaluate", "monai", "nibabel", "pandas", "pyarrow", "sklearn"} & {*sys.modules}
assert not late, f"`inlay predict` starts slowly: it imports {late}"

with warnings.catch_warnings(action="error"):
    import inlay.tasks.images.data
view, expected = pickle.loads(Path("view.pickle").read_bytes())
random.seed(5)
assert view[1]["pixel_values"].numpy().tobytes() == expected, "a worker of a DataLoader gets another item"

import transformers
from inlay.bases.processors import load_processor
from inlay.bases.sites import head_modules, lora_targets
from inlay.tasks.base import load_base

for quantize in QUANTIZE:
    base = load_base("builtin:vit-tiny", labels=["a", "b"], quantize=quantize)
    model = get_peft_model(base, LoraConfig(target_modules=lora_targets(base), modules_to_save=head_modules(base)))
    pixels = load_processor("builtin:vit-tiny")(images=torch.zeros(3, 40, 40), return_tensors="pt")["pixel_values"]
    model.eval()(pixel_values=pixels)
    assert transformers.utils.logging.is_progress_bar_enabled()
print("done")
"""


def test_inlay_imported_first_registers_all_and_says_nothing(tmp_path, monkeypatch):
    """Its networks in transformers and its methods in peft. What is said shows on a terminal only: give it one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_composite(tmp_path)
    save_view(tmp_path)
    code = INLAY_FIRST.replace("QUANTIZE", str([None, *(("8bit", "4bit") if find_spec("bitsandbytes") else ())]))
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY")}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path):
        os.close(theirs)
        said = b""
        while chunk := read(ours):
            said += chunk
    os.close(ours)
    assert said.split() == [b"done"], said.decode()


def read(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


INLAY_LAST = """
import importlib.util, json, sys

absent, find = {"inlay", "peft"}, importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in absent else find(name, package)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

torch.set_num_threads(1)
torch.set_grad_enabled(False)
base, said = sys.argv[1], {}
pixels = torch.load("pixels.pt")
picture = torch.arange(3 * 32 * 32).reshape(3, 32, 32).numpy().astype("uint8")

# Merged models, read with transformers only.
model = AutoModelForImageClassification.from_pretrained("merged-vit")
inputs = AutoImageProcessor.from_pretrained("merged-vit")(picture, return_tensors="pt")
said["label"] = model.config.id2label[model(**inputs).logits.argmax().item()]
model, tokenizer = AutoModelForCausalLM.from_pretrained("merged-gpt2"), AutoTokenizer.from_pretrained("merged-gpt2")
written = model.generate(**tokenizer(["The Oak"], return_tensors="pt"), max_new_tokens=8, do_sample=False)
said["text"] = written.tolist()
assert not {"inlay", "peft"} & {*sys.modules}

# A LoRA, read with peft; and methods that peft does not have.
absent.remove("peft")
transformers.utils.is_peft_available.cache_clear()
from peft import PeftConfig, PeftModel

options = {"num_labels": 3, "ignore_mismatched_sizes": True, "dtype": "float32"}
model = AutoModelForImageClassification.from_pretrained(base, **options)
said["logits"] = PeftModel.from_pretrained(model, "lora-vit").eval()(pixel_values=pixels).logits.tolist()
for name in ("bottleneck", "mam"):
    try:
        PeftConfig.from_pretrained(name)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
assert "inlay" not in sys.modules

# The same, after the import.
absent.clear()
import inlay

model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained("tiny"), "mam").eval()
pixels, expected = torch.load("mam.pt")
assert (model(pixel_values=pixels).logits - expected).abs().max() < 1e-5
print(json.dumps(said))
"""


def save_lora(name, folder):
    """A LoRA with random weights on an embedded base, saved; and the model."""
    model = METHODS["lora"].adapt(load_base(name, labels=LABELS) if "vit" in name else load_base(name), 4).eval()
    randomise(model, "default")
    processor = TextProcessor(load_tokenizer(name), max_length=64) if "gpt2" in name else load_processor(name)
    return model, save_adapter(model, folder, processor=processor)


@torch.no_grad()
def test_what_inlay_writes_is_read_without_it(tmp_path):
    """Merged models by transformers alone, a LoRA by plain peft, which names the methods that it does not have."""
    vit, folder = save_lora("builtin:vit-tiny", tmp_path / "lora-vit")
    merge(folder, tmp_path / "merged-vit")
    gpt2, folder = save_lora("builtin:gpt2-tiny", tmp_path / "lora-gpt2")
    merge(folder, tmp_path / "merged-gpt2")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    torch.save(pixels, tmp_path / "pixels.pt")
    save_composite(tmp_path)
    adapted("bottleneck", "vit").save_pretrained(tmp_path / "bottleneck")

    command = [sys.executable, "-c", INLAY_LAST, resolve_base("builtin:vit-tiny")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    shown = load_processor("builtin:vit-tiny")(PICTURE, return_tensors="pt")
    assert said["label"] == LABELS[vit(**shown).logits.argmax().item()]
    prompt = load_tokenizer("builtin:gpt2-tiny")(["The Oak"], return_tensors="pt")
    assert said["text"] == gpt2.generate(**prompt, max_new_tokens=8, do_sample=False).tolist()
    torch.testing.assert_close(torch.tensor(said["logits"]), vit(pixel_values=pixels).logits, rtol=0, atol=1e-6)
    assert said["bottleneck"] == "KeyError: 'INLAY_BOTTLENECK'" and said["mam"] == "KeyError: 'INLAY_COMPOSITE'"
