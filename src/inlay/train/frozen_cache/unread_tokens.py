"""Skip the tokens of the last block that a classifier does not read, forward and backward.

A ViT classifies by its first token, one row of 197. Of the last block's query, output projection, norm and MLP only
that row is needed. These modules are observed, not looked up. A module qualifies if the gradient of loss and logits
with respect to its output is zero in all other rows, and if the first input row by itself gives the same first output
row. The block then returns its first row only, so that code that reads another row fails instead of getting a wrong
value.

The results equal those of the whole computation except for rounding: sums over fewer rows are added in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _FirstRowOnly(nn.Module):
    """Calls a module with the first row (B, 1, D) only and fills the other rows with zeros, or cuts its output.

    It shares the parameters and children of the module, so that all keep their names.
    """

    def __init__(self, inner: nn.Module, cut: bool) -> None:
        super().__init__()
        self.__dict__.update(inner=inner, cut=cut, training=inner.training)
        for shared in ("_parameters", "_buffers", "_modules"):
            self.__dict__[shared] = getattr(inner, shared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def train(self, mode: bool = True) -> "_FirstRowOnly":
        """Set the mode of the wrapped module too, which is not a child."""
        self.inner.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called like the module."""
        if self.cut:
            output = self.inner(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            return (first[:, :1], *output[1:]) if isinstance(output, tuple) else first[:, :1]
        first = self.inner(args[0][:, :1])
        return nn.functional.pad(first, (0, 0, 0, args[0].shape[1] - 1))


def skip_unread_tokens(model: nn.Module, last: str, batch: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Replace the modules of the block `last` whose first row only is read for `batch`.

    Returns:
        The replaced modules by name, in the order that `restore_modules` needs; empty if other rows of the block are
        read.
    """
    with _record_calls(model, last) as calls:
        output = model(**batch)
    if not calls.get(last):
        return {}
    logits = output.logits.float()
    generator = torch.Generator().manual_seed(0)
    read = output.loss.float() + (logits * torch.randn(logits.shape, generator=generator).to(logits.device)).sum()
    found = {name: pair for name, pair in calls.items() if pair and pair[1].requires_grad}
    gradients = torch.autograd.grad(read, [output for _, output in found.values()], allow_unused=True)
    unread = {name for name, g in zip(found, gradients, strict=True) if g is not None and not g[:, 1:].any()}
    if last not in unread:
        return {}
    replaced: dict[str, nn.Module] = {}
    for name in found:  # outer modules come first
        module = model.get_submodule(name)
        inside = any(name.startswith(f"{outer}.") for outer in replaced)
        if name != last and name in unread and not inside and _computes_rows_separately(module, *found[name]):
            replaced[name] = module
    for name, module in (*replaced.items(), (last, model.get_submodule(last))):
        model.set_submodule(name, _FirstRowOnly(module, cut=name == last))
        replaced[name] = module
    return replaced


def restore_modules(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo `skip_unread_tokens`."""
    for name, module in replaced.items():
        model.set_submodule(name, module)


@contextmanager
def _record_calls(model: nn.Module, last: str) -> Iterator[dict[str, Any]]:
    """Record input and output of every module in the block that has parameters; outer modules first.

    The record of a module is None if it was called several times or its rows do not match.
    """
    inside = {n: m for n, m in model.named_modules() if n == last or n.startswith(f"{last}.")}
    calls: dict[str, Any] = dict.fromkeys(name for name, m in inside.items() if any(True for _ in m.parameters()))
    times = dict.fromkeys(calls, 0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            times[name] += 1
            rows = args and isinstance(args[0], torch.Tensor) and isinstance(first, torch.Tensor)
            rows = rows and args[0].ndim == first.ndim == 3 and args[0].shape[:2] == first.shape[:2]
            calls[name] = (args[0].detach(), first) if rows and times[name] == 1 else None

        return hook

    handles = [inside[name].register_forward_hook(watch(name)) for name in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _computes_rows_separately(module: nn.Module, values: torch.Tensor, output: torch.Tensor) -> bool:
    """True if the module returns one tensor whose first row depends on the first input row only."""
    try:
        first = module(values[:, :1])
    except Exception:  # it needs a mask, positions or all rows; unknown code may raise anything
        return False
    return isinstance(first, torch.Tensor) and torch.allclose(
        first.float(), output[:, :1].float(), rtol=1e-2, atol=1e-3
    )
