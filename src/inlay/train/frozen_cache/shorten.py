"""Frozen leading blocks run once per example: what they put out is kept, and every epoch starts from there.

Where the first k of n blocks, and all that comes before them, are frozen, k/n of every forward pass is needed only
once. `use_cached_states` runs all examples through that part before the first step, in the precision and batch size of
the step, and keeps the states that enter block k + 1, in memory or in a file that later runs find again. In training,
stand-ins take the place of the frozen blocks: the model's own code runs, its first modules on one blank row that nobody
reads, and the last frozen block's stand-in hands over the kept states.

Which blocks are frozen, and whether chance (dropout, drop path) acts in them, is not looked up but observed: a block is
frozen if its output, computed with gradients on, needs none; chance acts if a random generator has moved. Before it is
used, the short way is compared with the plain one: loss and all gradients of one small batch.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, default_collate

from inlay.bases.sites import sites
from inlay.errors import InlayError
from inlay.methods._peft import name_in_base
from inlay.train.config import TrainConfig
from inlay.train.evaluation import count_rows, train_mode
from inlay.train.frozen_cache.states import (
    Cut,
    NotCacheable,
    Runner,
    compute_states,
    digest_states,
    raise_together,
    random_generators,
)
from inlay.train.frozen_cache.unread_tokens import restore_modules, skip_unread
from inlay.train.sampler import SeededDataset, seed_all, seed_cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    Collate = Callable[[list[Any]], dict[str, Any]]

SAMPLE = 4  # examples on which the model is observed, and the two ways are compared


@dataclass(frozen=True)
class FitData:
    """What `fit` makes its loaders of; `train` takes draws, see `Draws`."""

    train: Any
    validation: Any
    collate: "Collate | None"
    workers: int


class _Skipped(nn.Module):
    """In the place of a frozen block: passes its input on, or `states` if there are any. The block answers the rest."""

    def __init__(self, block: nn.Module, extras: int | None) -> None:
        super().__init__()
        self.block, self.extras = block, extras
        self.states: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their blocks for `attention_type` and the like
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what any block takes: the states come first."""
        states = args[0] if args else next(iter(kwargs.values()))
        states = states if self.states is None else self.states
        return states if self.extras is None else (states, *[None] * self.extras)


class Tail(nn.Module):
    """A model that can be entered behind its frozen blocks, once `open` has been called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.blank: dict[str, torch.Tensor] = {}
        self._skipped: dict[str, _Skipped] = {}
        self._narrowed: dict[str, nn.Module] = {}

    def forward(self, kept: torch.Tensor | None = None, **batch: Any) -> Any:
        """The model's output for a batch, or for one in which `kept` states (B, ...) stand for the main input."""
        if kept is not None:
            list(self._skipped.values())[-1].states = kept
        return self.model(**self.blank, **batch)

    def open(self, cut: Cut, blank: dict[str, torch.Tensor]) -> None:
        """Put stand-ins into the place of the frozen blocks; `blank` is what the modules before them get."""
        self.blank = blank
        for name in cut.frozen:
            self._skipped[name] = _Skipped(self.model.get_submodule(name), cut.extras)
            self.model.set_submodule(name, self._skipped[name])

    def narrow(self, last: str, batch: dict[str, torch.Tensor]) -> bool:
        """See `skip_unread`; false if all is read."""
        self._narrowed = skip_unread(self, f"model.{last}", batch)
        return bool(self._narrowed)

    def widen(self) -> None:
        """Undo `narrow`."""
        restore_modules(self, self._narrowed)
        self._narrowed = {}

    def close(self) -> None:
        """Put everything back."""
        self.widen()
        for name, stand_in in self._skipped.items():
            self.model.set_submodule(name, stand_in.block)
        self._skipped, self.blank = {}, {}


def wrap_tail(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The model as a `Tail` where frozen blocks are to be skipped, else itself."""
    if config.cache_frozen == "no":
        return model
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _say(accelerator, f"{accelerator.distributed_type.value} distributes their weights")
        return model
    return Tail(model)


@contextmanager
def use_cached_states(
    net: nn.Module, data: FitData, config: TrainConfig, accelerator: Accelerator
) -> Iterator[FitData]:
    """Within the block a `Tail` is entered behind its frozen blocks, with the data that belong there.

    Where that is impossible, a sentence says why, and data and model stay as they are.
    """
    if not isinstance(net, Tail):
        yield data
        return
    try:
        try:
            short = _shorten(net, data, config, accelerator)
        except NotCacheable as reason:
            _say(accelerator, str(reason))
            net.close()
            short = data
        yield short
    finally:
        net.close()


def _say(accelerator: Accelerator, reason: str) -> None:
    accelerator.print(f"cache_frozen is off, the frozen blocks run in every epoch: {reason}")


def _shorten(net: Tail, data: FitData, config: TrainConfig, accelerator: Accelerator) -> FitData:
    """Keep the states of all examples, open the model and compare.

    Raises:
        Unkept: with the reason why not.
    """
    begun = time.perf_counter()
    source = data.train.data if isinstance(data.train, SeededDataset) else data.train
    collate = data.collate or default_collate
    sample = _sample(source, collate, accelerator)
    cut = _observe(net.model, sample, accelerator)
    count = len(source) + (len(data.validation) if data.validation is not None else 0)
    size = count * cut.shape.numel() * cut.dtype.itemsize
    if size > config.cache_gb * 1e9:
        raise NotCacheable(
            f"the states of {count} examples take {size / 1e9:.3g} GB, more than cache_gb {config.cache_gb:g}; "
            f"give --cache_gb {math.ceil(size / 1e7) / 100:g}, if there is room"
        )
    name = getattr(net.model, "main_input_name", "pixel_values")
    main = sample.get(name)
    blank = {name: torch.zeros_like(main[:1])} if main is not None and main.is_floating_point() else {}
    plain = _gradients(net, sample)
    runner = Runner(net.model, cut, accelerator, config, collate, tuple(blank))
    if config.cache_frozen == "disk":
        at_once = config.batch_size // accelerator.num_processes // config.accumulate
        runner.key = digest_states(net.model, cut, runner.states(sample), at_once)
    train = _Rows(compute_states(source, runner))
    validation = None if data.validation is None else _Rows(compute_states(data.validation, runner))
    net.open(cut, blank)
    first = {k: v[: count_rows(sample)].to(accelerator.device) for k, v in train.columns.items()}
    half = accelerator.mixed_precision != "no" or any(p.dtype.itemsize == 2 for p in net.parameters())
    most = 2e-2 if half else 1e-4
    raise_together(accelerator, _difference(plain, net, first, most))
    if len(cut.frozen) < len(cut.blocks):
        try:
            with accelerator.autocast():
                narrow = net.narrow(cut.blocks[-1], first)
            raise_together(accelerator, _difference(plain, net, first, most) if narrow else "all is read")
        except NotCacheable:  # or dropout draws for all rows
            net.widen()
    accelerator.print(
        f"{len(cut.frozen)} of {len(cut.blocks)} blocks are frozen: their output for {count} examples is kept "
        f"({size / 1e6:.0f} MB, {config.cache_frozen}, {time.perf_counter() - begun:.1f} s)"
    )
    return FitData(train, validation, _as_it_is, 0)


def _sample(source: Any, collate: "Collate", accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """A few examples as a batch on the device; drawn twice, in case they have a generator of their own."""
    twice = []
    for seed in (1, 2):
        seed_cpu(seed)
        batch = dict(collate([source[i] for i in range(min(SAMPLE, len(source)))]))
        odd = [k for k, v in batch.items() if not isinstance(v, torch.Tensor) or v.shape[:1] != (count_rows(batch),)]
        if odd or "labels" not in batch:
            raise NotCacheable(
                f"a batch must hold tensors with one row an example, and labels; look at {odd or 'labels'}"
            )
        twice.append(batch)
    if any(a.shape != twice[1][k].shape or not torch.equal(a, twice[1][k]) for k, a in twice[0].items()):
        raise NotCacheable("the training data is augmented at random, so no two epochs are alike")
    return {k: v.to(accelerator.device) for k, v in twice[0].items()}


def _observe(model: nn.Module, sample: dict[str, torch.Tensor], accelerator: Accelerator) -> Cut:
    """Run one batch in train mode and see how far the model is frozen."""
    blocks = _blocks(model)
    seen: list[tuple[str, Any, bool]] = []
    train_mode(model)
    seed_all(0)
    before = random_generators(accelerator.device)

    def watch(name: str) -> Any:
        return lambda module, args, output: seen.append((name, output, random_generators(accelerator.device) != before))

    handles = [block.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        with accelerator.autocast():
            model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(name for name, *_ in seen) != sorted(blocks):
        raise NotCacheable(f"its {len(blocks)} blocks do not run once each ({len(seen)} calls)")
    outputs = [output if isinstance(output, tuple) else (output,) for _, output, _ in seen]
    free = [i for i, (first, *_) in enumerate(outputs) if getattr(first, "requires_grad", True)]
    frozen = free[0] if free else len(seen)
    if not frozen:
        raise NotCacheable("the first block, or what comes before it, is trained")
    name, output, chance = seen[frozen - 1]
    if chance:
        raise NotCacheable(
            "dropout or drop path acts in the frozen blocks, so no two epochs are alike; set its rate to 0"
        )
    first, *others = outputs[frozen - 1]
    if first.shape[0] != count_rows(sample) or any(value is not None for value in others):
        raise NotCacheable(f"{name} puts out something else than one tensor with a row an example")
    order = tuple(name for name, *_ in seen)
    return Cut(order[:frozen], order, first.shape[1:], first.dtype, len(others) if isinstance(output, tuple) else None)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, with the adapters that are wrapped around them, by their names in it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    outermost: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        outermost.setdefault(name_in_base(name), module)
    places = {id(module): name for name, module in model.named_modules()}
    try:
        return {places[id(outermost[name])]: outermost[name] for name in sites(base).blocks}
    except (InlayError, KeyError):
        raise NotCacheable(f"the blocks of {type(base).__name__} cannot be told") from None


class _Rows(Dataset[Any]):
    """Kept states and the inputs that stay, whole batches at a time; keys are row numbers or draws."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return count_rows(self.columns)

    def __getitems__(self, keys: list[Any]) -> dict[str, torch.Tensor]:
        rows = torch.tensor([key[0] if isinstance(key, tuple) else key for key in keys])
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}


def _as_it_is(batch: Any) -> Any:
    return batch


def _gradients(net: Tail, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The loss of a batch and its gradients, in train mode, under one and the same seed."""
    train_mode(net)
    seed_all(0)
    loss = net(**batch).loss
    trained = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach().float(), *(torch.zeros(1) if g is None else g.float() for g in found)]


def _difference(plain: list[torch.Tensor], net: Tail, batch: dict[str, torch.Tensor], most: float) -> str | None:
    """Whether loss and gradients of the short way are further from the plain ones than the relative error `most`."""
    try:
        short = _gradients(net, batch)
    except Exception as error:  # what a model's own code raises where a stand-in does not do is not documented
        return f"the model does not run without them ({type(error).__name__}: {error})"
    total = max(float(a.norm()) for a in plain[1:])
    for i, (a, b) in enumerate(zip(plain, short, strict=True)):
        if a.shape != b.shape or not float((a - b).norm()) <= most * (float(a.norm()) + 0.01 * total):
            what = "loss" if not i else "gradient"
            return f"the {what} of a first batch would be another ({float(a.norm()):.6g}, {float(b.norm()):.6g})"
    return None
