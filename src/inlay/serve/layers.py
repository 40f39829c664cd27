"""Layers of a bank: what all its adapters add at one module, stacked, and chosen row by row of the batch.

Slot 0 of every stack is the plain base: zeros. So are the slots of adapters that have nothing at a module, and the end
of those of a smaller width. Rows of one batch under different adapters cost one gather and one batched matrix product,
however many adapters there are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from typing_extensions import override

from inlay.errors import InlayError
from inlay.methods.base import AdapterLayer
from inlay.methods.bottleneck import BottleneckLayer

Tensors = Mapping[str, torch.Tensor]


class Rows:
    """Which slot each row of the batch under way has, for all layers of a bank.

    Attributes:
        slots: One per row; none outside of a forward.
        only: The slot of all rows, None if they differ.
        index: The slots as a tensor, on the bank's device.
        capacity: Slots in each stack.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.capacity = 1
        self.choose([])

    def choose(self, slots: Sequence[int]) -> None:
        """Set the slots of the rows of the next batch."""
        different = set(slots)
        self.slots = list(slots)
        self.only = None if len(different) > 1 else next(iter(different), 0)
        self.index = torch.tensor(self.slots, dtype=torch.long, device=self.device)

    def expand(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Values of the batch's rows for a tensor of so many rows: SAM's windows, or a search's beams, are several."""
        each = rows // len(values)
        if each * len(values) != rows:
            raise InlayError(f"expected one adapter for each of {rows} rows, got {len(values)}.")
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

    def put(self, slot: int, values: Tensors) -> None:
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

    def take(self, key: str, rows: int) -> torch.Tensor:
        """What each of so many rows has in a stack."""
        stack = self._buffers[key]
        assert stack is not None
        return self.rows.expand(stack.index_select(0, self.rows.index), rows)


class BankLayer(AdapterLayer):
    """Wraps one module of the base and holds what every adapter of a bank adds there."""

    adapter_layer_names: Any = ()

    def __init__(self, base_layer: nn.Module, rows: Rows) -> None:
        super().__init__(base_layer)
        self.rows = rows
        self.inlay_bank_stacks = Stacks(rows)

    @property
    def stacks(self) -> Stacks:
        """The tensors of all slots."""
        return self.inlay_bank_stacks

    def check(self, settings: Any) -> None:
        """Raise InlayError if an adapter of these settings cannot stand beside those that are here."""

    def stored(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        """An adapter's tensors as they go into the stacks."""
        raise NotImplementedError

    def absent(self) -> dict[str, torch.Tensor]:
        """What stands in the slot of an adapter that has nothing here."""
        return {}

    def size_of(self, values: Tensors) -> int:
        """Prompt length or number of labels, where there is one."""
        return 0

    def banked(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module gives for the rows of this batch."""
        raise NotImplementedError

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.rows.only == 0 or not self.stacks._buffers
        return self.base_layer(*args, **kwargs) if plain else self.banked(*args, **kwargs)

    def product(self, x: torch.Tensor, key: str, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, T, n) times the transpose of each row's matrix (m, n), added to `onto` (B or 1, T or 1, m)."""
        if self.rows.only is not None:
            product = x @ self.stacks._buffers[key][self.rows.only].mT
            return product if onto is None else onto + product
        matrix = self.stacks.take(key, len(x)).mT
        return torch.bmm(x, matrix) if onto is None else torch.baddbmm(onto, x, matrix)

    def lengths(self) -> list[int]:
        """Prompt length of each row of the batch."""
        return [self.stacks.sizes.get(slot, 0) for slot in self.rows.slots]

    def counts(self, lengths: list[int], rows: int) -> torch.Tensor | None:
        """Which of the longest prompt's tokens each row has, (rows, P); None where all have all."""
        if min(lengths) == max(lengths):
            return None
        limits = torch.tensor(lengths, device=self.rows.device)[:, None]
        return self.rows.expand(torch.arange(max(lengths), device=self.rows.device) < limits, rows)

    def row(self, key: str, rows: int) -> torch.Tensor:
        """Each row's vector (B or 1, 1, m)."""
        if self.rows.only is not None:
            return self.stacks._buffers[key][self.rows.only][None, None]
        return self.stacks.take(key, rows)[:, None]


class LoraBank(BankLayer):
    """B·A·x of each row, around a linear layer or a 1x1 convolution; the scale is in B."""

    rank = 1

    @override
    def stored(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        down, up = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        values = {"down": down.flatten(1), "up": up.flatten(1) * settings}  # r x inputs, outputs x r
        if (bias := tensors.get("lora_B.bias")) is not None:
            values["bias"] = bias.float() * settings
        return values

    @override
    def banked(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        inner = self.get_base_layer()
        if isinstance(inner, nn.Conv2d):  # B C H W: positions are tokens
            step_y, step_x = inner.stride
            x = x[..., ::step_y, ::step_x].movedim(1, -1)
            total = result.movedim(1, -1)
        else:
            total = result
        width = x.shape[-1]
        tokens = x.reshape(len(x), -1, width).to(torch.float32)
        if total.dtype == torch.float32:
            total = self.product(self.product(tokens, "down"), "up", total.reshape(len(x), -1, total.shape[-1]))
        else:
            added = self.product(self.product(tokens, "down"), "up")
            total = total.reshape(len(x), -1, total.shape[-1]) + added.to(total.dtype)
        if "bias" in self.stacks._buffers:
            total = total + self.row("bias", len(x)).to(total.dtype)
        if isinstance(inner, nn.Conv2d):
            return total.movedim(-1, 1).reshape(result.shape)
        return total.reshape(result.shape)


class BottleneckBank(BankLayer, BottleneckLayer):
    """Bottlenecks of one placement and non-linearity; the scale is in W_up and b_up."""

    rank = 3

    @override
    def check(self, settings: Any) -> None:
        own = self.options.get("bank")
        for what in ("placement", "activation", "layer_norm"):
            if own is not None and getattr(own, what) != getattr(settings, what):
                raise InlayError(
                    f"the bottlenecks of a bank are alike in {what}: here it is {getattr(own, what)}, got "
                    f"{getattr(settings, what)}; give this adapter a bank of its own."
                )

    @override
    def stored(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        self.options["bank"] = settings
        weight = tensors["inlay_bottleneck_weight"].float()
        learned = tensors.get("inlay_bottleneck_scale")
        scale: Any = settings.scale if learned is None else learned.float()
        after = settings.layer_norm == "after"
        up = weight[1].T  # d x m
        values = {"down": weight[0], "up": up if after else up * scale}
        if (bias := tensors.get("inlay_bottleneck_bias")) is not None:
            down_bias, up_bias = bias.float().split([weight.shape[1], weight.shape[2]])
            values |= {"down_bias": down_bias, "up_bias": up_bias if after else up_bias * scale}
        if settings.layer_norm:
            for leaf in ("weight", "bias"):
                norm = tensors[f"inlay_bottleneck_norm.{leaf}"].float()
                values[f"norm_{leaf}"] = norm * scale if after else norm
        return values

    @override
    def banked(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted([(["bank"], None)], *args, **kwargs)  # which asks for `_sum`

    @override
    def _sum(self, x: torch.Tensor, groups: Any) -> torch.Tensor:
        if self.channels_first:
            x = x.movedim(1, -1)
        config, here = self.options["bank"], self.stacks._buffers
        h = x.reshape(len(x), -1, x.shape[-1]).to(torch.float32)
        h = self._norm(h) if config.layer_norm == "before" else h
        h = self.product(h, "down", self.row("down_bias", len(x)) if "down_bias" in here else None)
        h = h if config.activation is None else ACT2FN[config.activation](h)
        h = self.product(h, "up", self.row("up_bias", len(x)) if "up_bias" in here else None)
        h = self._norm(h) if config.layer_norm == "after" else h
        total = h.reshape(x.shape).to(x.dtype)
        return total.movedim(-1, 1) if self.channels_first else total

    def _norm(self, h: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(h, h.shape[-1:])
        return normed * self.row("norm_weight", len(h)) + self.row("norm_bias", len(h))


class HeadBank(BankLayer):
    """A head of each row. Rows with fewer labels than others of the batch get -inf for those that they do not have."""

    rank = 1

    def __init__(self, base_layer: nn.Module, rows: Rows) -> None:
        super().__init__(base_layer, rows)
        self.own = self.stored({k: p.detach() for k, p in base_layer.named_parameters()}, None)
        for slot in range(rows.capacity):
            self.stacks.put(slot, self.absent())
            self.stacks.sizes[slot] = self.size_of(self.own)

    @override
    def stored(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in tensors.items()}  # K x d, K

    @override
    def absent(self) -> dict[str, torch.Tensor]:
        return self.own  # adapters without a head, and the plain base, have the base's

    @override
    def size_of(self, values: Tensors) -> int:
        return len(values["weight"])

    @override
    def banked(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.stacks.sizes[slot] for slot in self.rows.slots]
        tokens = x.reshape(len(x), -1, x.shape[-1]).float()
        bias = self.row("bias", len(x)) if "bias" in self.stacks._buffers else None
        logits = self.product(tokens, "weight", bias)[..., : max(sizes)]
        if min(sizes) < max(sizes):
            limits = self.rows.expand(torch.tensor(sizes, device=x.device), len(x))[:, None, None]
            logits = logits.masked_fill(torch.arange(max(sizes), device=x.device) >= limits, -math.inf)
        return logits.reshape(*x.shape[:-1], -1).to(x.dtype)
