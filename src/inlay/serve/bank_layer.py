"""Layers of a bank: what all its adapters add at one module, stacked, and chosen row by row of the batch.

Slot 0 of every stack is the plain base: zeros. So are the slots of adapters that have nothing at a module, and the end
of those of a smaller width. Rows of one batch under different adapters cost one gather and one batched matrix product,
however many adapters there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from inlay.errors import BadInput
from inlay.methods.base import AdapterLayer

Tensors = Mapping[str, torch.Tensor]
KEY_START = "base_model.model."  # of the keys in a file of peft


class Rows:
    """Which slot each row of the batch under way has, for all layers of a bank.

    Attributes:
        slots: One per row; none outside of a forward.
        only: The slot of all rows, None if they differ.
        index: The slots as a tensor, on the bank's device.
        ahead: Tokens in the cache in front of each row's text, (B,); None where no row has any.
        capacity: Slots in each stack.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity = 1
        self.choose([])

    def choose(self, slots: Sequence[int], ahead: Sequence[int] = ()) -> None:
        """Set the slots of the rows of the next batch, and how many tokens in the cache stand in front of each."""
        different = set(slots)
        self.slots = list(slots)
        self.only = None if len(different) > 1 else next(iter(different), 0)
        self.index = torch.tensor(self.slots, dtype=torch.long, device=self.device)
        self.ahead = torch.tensor(ahead, device=self.device) if any(ahead) else None

    def expand(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Values of the batch's rows for a tensor of so many rows: SAM's windows, or a search's beams, are several."""
        each = rows // len(values)
        if each * len(values) != rows:
            raise BadInput(f"{len(values)} adapters for {rows} rows; give one for each row.")
        return values if each == 1 else values.repeat_interleave(each, dim=0)


class Stacks(nn.Module):
    """Tensors of all slots, of the largest width that any has had."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.sizes: dict[int, int] = {}  # by slot: prompt length, or labels of a head

    def shapes(self, values: Tensors) -> dict[str, tuple[int, ...]]:
        """Of one slot in each stack, once `values` are in it."""
        found = {key: tuple(stack.shape[1:]) for key, stack in self._buffers.items() if stack is not None}
        for key, value in values.items():
            found[key] = tuple(map(max, value.shape, found.get(key, value.shape)))
        return found

    def fill_slot(self, slot: int, values: Tensors) -> None:
        """Fill a slot; what `values` leave out is zero there."""
        shapes = self.shapes(values)
        for key, shape in shapes.items():
            stack, value = self._buffers.get(key), values.get(key)
            if stack is None or stack.shape[1:] != shape:
                stack = self._resize(key, shape, range(self.rows.capacity))
            here = stack.select(0, slot)
            if value is not None and value.shape == shape:
                here.copy_(value)
                continue
            here.zero_()
            if value is not None:
                here[tuple(map(slice, value.shape))].copy_(value)

    def repack(self, order: Sequence[int]) -> None:
        """Make room for `rows.capacity` slots; the first ones get what was in the slots `order`."""
        for key, stack in list(self._buffers.items()):
            assert stack is not None
            self._resize(key, tuple(stack.shape[1:]), order)
        self.sizes = {new: self.sizes[old] for new, old in enumerate(order) if old in self.sizes}

    def _resize(self, key: str, shape: tuple[int, ...], order: Sequence[int]) -> torch.Tensor:
        fresh = torch.zeros(self.rows.capacity, *shape, device=self.rows.device)
        old = self._buffers.get(key)
        if old is not None:
            kept = [slot for slot in order if slot < len(old)]
            where = (slice(len(kept)), *map(slice, old.shape[1:]))
            fresh[where] = old if kept == list(range(len(old))) else old[kept]
        self.register_buffer(key, fresh, persistent=False)
        return fresh

    def take_rows(self, key: str, rows: int) -> torch.Tensor:
        """What each of so many rows has in a stack."""
        stack = self._buffers[key]
        assert stack is not None
        return self.rows.expand(stack.index_select(0, self.rows.index), rows)


@dataclass(frozen=True)
class Site:
    """One module at which adapters of one config have tensors.

    Attributes:
        module: Its name in the base.
        kind: The layer of a bank that goes around it.
        keys: Names of the tensors in a file, by what they are called in the layer.
        settings: What else the layer must know: a scale, a config, or names of modules.
    """

    module: str
    kind: "type[BankLayer]"
    keys: dict[str, str]
    settings: Any = None


class BankLayer(AdapterLayer):
    """Wraps one module of the base and holds what every adapter of a bank adds there.

    Attributes:
        stands_for: The layer of a method that an adapter has there when it is loaded by itself; None where another
            class of the bank gives the sites of that layer.
    """

    stands_for: ClassVar[type[nn.Module] | None] = None
    adapter_layer_names: Any = ()

    def __init__(self, base_layer: nn.Module, rows: Rows) -> None:
        super().__init__(base_layer)
        self.rows = rows
        self.inlay_bank_stacks = Stacks(rows)

    @classmethod
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        """Where in a bank goes what an adapter has at one module.

        Args:
            base: The base with the adapter in it, without weights.
            name: Of the module.
            layer: A layer of the class `stands_for` around that module.
            keys: Names of the adapter's tensors in a file, by what they are called in the layer.

        Raises:
            InlayError: A form of the method that does not add to each row by itself.
        """
        return Site(name, cls, keys)

    @classmethod
    def reason_against_mixing(cls, layer: Any) -> str | None:
        """Why a bank can hold an adapter with such a layer only where it has no other method; None where it can."""
        return None

    @property
    def stacks(self) -> Stacks:
        """The tensors of all slots."""
        return self.inlay_bank_stacks

    def check_settings(self, settings: Any) -> None:
        """Raise InlayError if an adapter of these settings cannot share the bank with those that are here."""

    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        """An adapter's tensors as they go into the stacks."""
        raise NotImplementedError

    def values_if_absent(self) -> dict[str, torch.Tensor]:
        """What stands in the slot of an adapter that has nothing here."""
        return {}

    def size_of(self, values: Tensors) -> int:
        """Prompt length or number of labels, where there is one."""
        return 0

    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module gives for the rows of this batch."""
        raise NotImplementedError

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.rows.only == 0 or not self.stacks._buffers
        return self.base_layer(*args, **kwargs) if plain else self.forward_rows(*args, **kwargs)

    def multiply_rows(self, x: torch.Tensor, key: str, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, n) times the transpose of each row's matrix (m, n), added to `onto` (B or 1, T or 1, m)."""
        if self.rows.only is not None:
            product = x @ self.stacks._buffers[key][self.rows.only].mT
            return product if onto is None else onto + product
        matrix = self.stacks.take_rows(key, len(x)).mT
        return torch.bmm(x, matrix) if onto is None else torch.baddbmm(onto, x, matrix)

    def prompt_lengths(self) -> list[int]:
        """Prompt length of each row of the batch."""
        return [self.stacks.sizes.get(slot, 0) for slot in self.rows.slots]

    def mask_prompts(self, lengths: list[int], rows: int) -> torch.Tensor | None:
        """Which of the longest prompt's tokens each row has, (rows, P); None where all have all."""
        if min(lengths) == max(lengths):
            return None
        limits = torch.tensor(lengths, device=self.rows.device)[:, None]
        return self.rows.expand(torch.arange(max(lengths), device=self.rows.device) < limits, rows)

    def take_vectors(self, key: str, rows: int) -> torch.Tensor:
        """Each row's vector (B or 1, 1, m)."""
        if self.rows.only is not None:
            return self.stacks._buffers[key][self.rows.only][None, None]
        return self.stacks.take_rows(key, rows)[:, None]
