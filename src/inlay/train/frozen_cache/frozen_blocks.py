"""Run frozen leading blocks once per example, store their output, and start every epoch from it.

If the first k of n blocks and everything before them are frozen, k/n of every forward pass is needed only once.
`use_cached_states` runs all examples through this part before the first step, in the precision and batch size of a
step. It stores the states that enter block k + 1, in memory or in a file that later runs can use.

During training, stand-ins replace the frozen blocks. The model's own code still runs: its first modules get one blank
row, whose result is not used, and the stand-in of the last frozen block returns the stored states.

Which blocks are frozen is observed, not looked up. A block is frozen if its output, computed with gradients enabled,
requires no gradient. Randomness (dropout, drop path) acts in it if a random generator has advanced. Before the cache is
used, loss and all gradients of one small batch are compared with those of the whole model.
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
from inlay.train.evaluation import count_rows, set_train_mode
from inlay.train.frozen_cache.states import (
    EntryPoint,
    FrozenPartRunner,
    NotCacheable,
    compute_states,
    digest_states,
    raise_together,
    random_generators,
)
from inlay.train.frozen_cache.unread_tokens import restore_modules, skip_unread_tokens
from inlay.train.sampler import SeededDataset, seed_all, seed_cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    Collate = Callable[[list[Any]], dict[str, Any]]

SAMPLE_SIZE = 4  # examples on which the model is observed and the cached computation is checked


@dataclass(frozen=True)
class FitData:
    """Data from which `fit` builds its loaders; `train` is indexed by `SeededIndex`."""

    train: Any
    validation: Any
    collate: "Collate | None"
    workers: int
    prefetch: int = 2


class _SkippedBlock(nn.Module):
    """Stand-in for a frozen block: returns `states` if set, else its input. Other attributes come from the block."""

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
        """Called like the block; the first argument is the hidden states."""
        states = args[0] if args else next(iter(kwargs.values()))
        states = states if self.states is None else self.states
        return states if self.extras is None else (states, *[None] * self.extras)


class CachedStatesModel(nn.Module):
    """A model that can start from stored states, once `replace_frozen_blocks` has been called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.blank: dict[str, torch.Tensor] = {}
        self._skipped: dict[str, _SkippedBlock] = {}
        self._replaced: dict[str, nn.Module] = {}

    def forward(self, cached_states: torch.Tensor | None = None, **batch: Any) -> Any:
        """The model's output for a batch, in which `cached_states` (B, ...) may replace the main input."""
        if cached_states is not None:
            list(self._skipped.values())[-1].states = cached_states
        return self.model(**self.blank, **batch)

    def replace_frozen_blocks(self, entry: EntryPoint, blank: dict[str, torch.Tensor]) -> None:
        """Replace the frozen blocks with stand-ins; `blank` is the input of the modules before them."""
        self.blank = blank
        for name in entry.frozen:
            self._skipped[name] = _SkippedBlock(self.model.get_submodule(name), entry.extras)
            self.model.set_submodule(name, self._skipped[name])

    def skip_unread_tokens(self, last: str, batch: dict[str, torch.Tensor]) -> bool:
        """Apply `skip_unread_tokens` to the block `last`; False if all of its tokens are read."""
        self._replaced = skip_unread_tokens(self, f"model.{last}", batch)
        return bool(self._replaced)

    def compute_all_tokens(self) -> None:
        """Undo `skip_unread_tokens`."""
        restore_modules(self, self._replaced)
        self._replaced = {}

    def restore(self) -> None:
        """Put all original modules back."""
        self.compute_all_tokens()
        for name, stand_in in self._skipped.items():
            self.model.set_submodule(name, stand_in.block)
        self._skipped, self.blank = {}, {}


def wrap_for_cache(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The model as a `CachedStatesModel` if `cache_frozen` is set, else the model itself."""
    if config.cache_frozen == "no":
        return model
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        _print_why_off(accelerator, f"{accelerator.distributed_type.value} distributes their weights")
        return model
    return CachedStatesModel(model)


@contextmanager
def use_cached_states(
    net: nn.Module, data: FitData, config: TrainConfig, accelerator: Accelerator
) -> Iterator[FitData]:
    """Within the block, a `CachedStatesModel` starts from stored states, and the data yield these states.

    If that is not possible, the reason is printed, and data and model are unchanged.
    """
    if not isinstance(net, CachedStatesModel):
        yield data
        return
    try:
        try:
            cached = _cache_states(net, data, config, accelerator)
        except NotCacheable as reason:
            _print_why_off(accelerator, str(reason))
            net.restore()
            cached = data
        yield cached
    finally:
        net.restore()


def _print_why_off(accelerator: Accelerator, reason: str) -> None:
    accelerator.print(f"cache_frozen is off, the frozen blocks run in every epoch: {reason}")


def _cache_states(net: CachedStatesModel, data: FitData, config: TrainConfig, accelerator: Accelerator) -> FitData:
    """Store the states of all examples, replace the frozen blocks, and check loss and gradients.

    Raises:
        NotCacheable: The states cannot be stored or used; the message gives the reason.
    """
    begun = time.perf_counter()
    source = data.train.data if isinstance(data.train, SeededDataset) else data.train
    collate = data.collate or default_collate
    sample = _draw_sample(source, collate, accelerator)
    entry = _find_entry_point(net.model, sample, accelerator)
    count = len(source) + (len(data.validation) if data.validation is not None else 0)
    size = count * entry.shape.numel() * entry.dtype.itemsize
    if size > config.cache_gb * 1e9:
        raise NotCacheable(
            f"the states of {count} examples take {size / 1e9:.3g} GB, more than cache_gb {config.cache_gb:g}; "
            f"set --cache_gb {math.ceil(size / 1e7) / 100:g} if there is enough room"
        )
    name = getattr(net.model, "main_input_name", "pixel_values")
    main = sample.get(name)
    blank = {name: torch.zeros_like(main[:1])} if main is not None and main.is_floating_point() else {}
    expected = _compute_loss_and_gradients(net, sample)
    runner = FrozenPartRunner(net.model, entry, accelerator, config, collate, tuple(blank))
    if config.cache_frozen == "disk":
        rows_at_once = config.batch_size // accelerator.num_processes // config.accumulate
        runner.key = digest_states(net.model, entry, runner.compute_batch(sample), rows_at_once)
    train = _CachedDataset(compute_states(source, runner))
    validation = None if data.validation is None else _CachedDataset(compute_states(data.validation, runner))
    net.replace_frozen_blocks(entry, blank)
    first = {k: v[: count_rows(sample)].to(accelerator.device) for k, v in train.columns.items()}
    half = accelerator.mixed_precision != "no" or any(p.dtype.itemsize == 2 for p in net.parameters())
    tolerance = 2e-2 if half else 1e-4
    raise_together(accelerator, _explain_difference(expected, net, first, tolerance))
    if len(entry.frozen) < len(entry.blocks):
        try:
            with accelerator.autocast():
                skips = net.skip_unread_tokens(entry.blocks[-1], first)
            reason = _explain_difference(expected, net, first, tolerance) if skips else "all tokens are read"
            raise_together(accelerator, reason)
        except NotCacheable:  # all tokens are read, or dropout draws numbers for all of them
            net.compute_all_tokens()
    accelerator.print(
        f"{len(entry.frozen)} of {len(entry.blocks)} blocks are frozen: their output for {count} examples is kept "
        f"({size / 1e6:.0f} MB, {config.cache_frozen}, {time.perf_counter() - begun:.1f} s)"
    )
    return FitData(train, validation, _return_unchanged, 0)


def _draw_sample(source: Any, collate: "Collate", accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """A few examples as a batch on the device. They are read twice, as the data may use its own random generator."""
    twice = []
    for seed in (1, 2):
        seed_cpu(seed)
        batch = dict(collate([source[i] for i in range(min(SAMPLE_SIZE, len(source)))]))
        odd = [k for k, v in batch.items() if not isinstance(v, torch.Tensor) or v.shape[:1] != (count_rows(batch),)]
        if odd or "labels" not in batch:
            raise NotCacheable(
                f"a batch must hold labels, and tensors with one row per example; check {odd or 'labels'}"
            )
        twice.append(batch)
    if any(a.shape != twice[1][k].shape or not torch.equal(a, twice[1][k]) for k, a in twice[0].items()):
        raise NotCacheable("the training data is augmented at random, so every epoch differs")
    return {k: v.to(accelerator.device) for k, v in twice[0].items()}


def _find_entry_point(model: nn.Module, sample: dict[str, torch.Tensor], accelerator: Accelerator) -> EntryPoint:
    """Run one batch in train mode, and find the last frozen block.

    Raises:
        NotCacheable: No leading block is frozen, or its output cannot be stored.
    """
    blocks = find_blocks(model)
    seen: list[tuple[str, Any, bool]] = []
    set_train_mode(model)
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
    trained = [i for i, (first, *_) in enumerate(outputs) if getattr(first, "requires_grad", True)]
    frozen = trained[0] if trained else len(seen)
    if not frozen:
        raise NotCacheable("the first block, or what comes before it, is trained")
    name, output, is_random = seen[frozen - 1]
    if is_random:
        raise NotCacheable("dropout or drop path acts in the frozen blocks, so every epoch differs; set its rate to 0")
    first, *others = outputs[frozen - 1]
    if first.shape[0] != count_rows(sample) or any(value is not None for value in others):
        raise NotCacheable(f"{name} does not return one tensor with one row per example")
    order = tuple(name for name, *_ in seen)
    return EntryPoint(
        order[:frozen], order, first.shape[1:], first.dtype, len(others) if isinstance(output, tuple) else None
    )


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, including adapters wrapped around them, by their names in the model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    outermost: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        outermost.setdefault(name_in_base(name), module)
    places = {id(module): name for name, module in model.named_modules()}
    try:
        return {places[id(outermost[name])]: outermost[name] for name in sites(base).blocks}
    except (InlayError, KeyError):
        raise NotCacheable(f"the blocks of {type(base).__name__} are not known") from None


class _CachedDataset(Dataset[Any]):
    """Stored states and the remaining inputs, read in whole batches; keys are row numbers or `SeededIndex`."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return count_rows(self.columns)

    def __getitems__(self, keys: list[Any]) -> dict[str, torch.Tensor]:
        rows = torch.tensor([key[0] if isinstance(key, tuple) else key for key in keys])
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}


def _return_unchanged(batch: Any) -> Any:
    return batch


def _compute_loss_and_gradients(net: CachedStatesModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of a batch in train mode, always under the same seed."""
    set_train_mode(net)
    seed_all(0)
    loss = net(**batch).loss
    trained = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach().float(), *(torch.zeros(1) if g is None else g.float() for g in found)]


def _explain_difference(
    expected: list[torch.Tensor], net: CachedStatesModel, batch: dict[str, torch.Tensor], tolerance: float
) -> str | None:
    """Say what differs if loss or gradients from stored states miss the expected ones by more than `tolerance`.

    Returns:
        None if all are equal within this relative error.
    """
    try:
        found = _compute_loss_and_gradients(net, batch)
    except Exception as error:  # a model's own code may raise anything where it needs the real block
        return f"the model does not run without them ({type(error).__name__}: {error})"
    largest = max(float(a.norm()) for a in expected[1:])
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape or not float((a - b).norm()) <= tolerance * (float(a.norm()) + 0.01 * largest):
            what = "loss" if not i else "gradient"
            return f"the {what} of a first batch would change from {float(a.norm()):.6g} to {float(b.norm()):.6g}"
    return None
