"""LoRA on the embedded ViT under FSDP2, as a program of its own that several processes run.

python tests/train/sharded_job.py FOLDER STEP      the step at which it is killed; 0: it is not
python tests/train/sharded_job.py FOLDER whole     a stream with the whole weights in each process (DDP), for comparison
"""

import os
import signal
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from points import Interrupted
from train_job import Accuracy

from inlay import InlayError, TrainConfig, fit, load_base, load_processor, save_adapter
from inlay.bases.sites import head_modules, lora_targets
from inlay.train import run
from inlay.train.stream import Stream

BASE, CLASSES = "builtin:vit-tiny", 3


class Noise(torch.utils.data.Dataset):
    """Images of noise around a mean that tells the class; `broken` of them are NaN."""

    def __init__(self, rows: int, shift: int, shape: tuple[int, ...], broken: int = 0) -> None:
        self.rows, self.shift, self.shape, self.broken = rows, shift, shape, broken

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index + self.shift)
        label = index % CLASSES
        pixels = torch.randn(self.shape, generator=generator) + label - 1
        return {"pixel_values": pixels * float("nan") if index < self.broken else pixels, "labels": label}


def train(
    folder: Path, die_at: int = 0, broken: int = 0, stop_at: int = 0, streams: bool = False, **options
) -> PeftModel:
    """Train, look whether the base is as it was, and save the adapter."""
    base = load_base(BASE, labels=[str(i) for i in range(CLASSES)])
    torch.manual_seed(0)  # not before the base is loaded, which draws more in a program of its own than in the suite
    base.classifier.reset_parameters()
    config = LoraConfig(r=2, target_modules=lora_targets(base, "attention"), modules_to_save=head_modules(base))
    model = get_peft_model(base, config)
    shape = (base.config.num_channels, base.config.image_size, base.config.image_size)
    calls = []

    def count(module, args):
        calls.append(module.training)
        if die_at and sum(calls) == 2 * die_at:  # a step has two pieces
            os.kill(os.getpid(), signal.SIGKILL)
        if stop_at and sum(calls) == 2 * stop_at:
            raise Interrupted

    base.vit.embeddings.register_forward_pre_hook(count)
    settings = {"batch_size": 8, "epochs": 2, "accumulate": 2, "eval_every": 3, "save_every": 2, "workers": 0}
    config = TrainConfig(str(folder / "run"), learning_rate=3e-3, **settings | options)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    data = Noise(20, 0, shape, broken)
    fit(model, open_stream(data) if streams else data, Noise(7, 1000, shape), config, metrics=[Accuracy()])
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in frozen.items())
    save_adapter(model, folder / "adapter", processor=load_processor(BASE))
    return model


def open_stream(data: Noise) -> Stream:
    """The same images as rows of four shards, two for each of two processes."""
    rows = datasets.Dataset.from_dict({"number": range(len(data))}).to_iterable_dataset(num_shards=4)
    return Stream(rows, prepare=lambda row: data[row["number"]], buffer=6)


def train_on_stream(folder: Path, stop_at: int = 0) -> None:
    train(folder, stop_at=stop_at, streams=True, steps=5)


def main(folder: Path, die_at: int) -> None:
    """The run `killed`, until it is killed; then it again, an undisturbed one, and what must be refused."""
    if die_at:
        train(folder / "killed", die_at)
    train(folder / "killed")
    train(folder / "whole")
    train(folder / "half", precision="bf16", epochs=0.4)
    train_on_stream(folder / "stream")
    try:
        train_on_stream(folder / "stopped stream", stop_at=4)
    except Interrupted:
        train_on_stream(folder / "stopped stream")
    run._FILE_SEEN_S = 0
    own = folder / f"disk {os.environ['RANK']}"
    for place, broken in ((folder / "broken", 1), (own, 0)):
        try:
            train(place, broken=broken)
        except InlayError as error:
            print(f"refused: {error}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "whole":
        train_on_stream(Path(sys.argv[1]) / "stream of whole weights")
        sys.exit()
    # accelerate shards on GPUs only: it takes these processes, which talk through gloo, for some
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    main(Path(sys.argv[1]), int(sys.argv[2]))
