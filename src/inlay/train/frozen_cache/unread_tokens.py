"""What a classifier does not read of its last block is not computed, forward or backward.

A ViT classifies by its first token: of the last block's query, output projection, norm and MLP only that row counts,
out of 197. Which modules these are is observed, not looked up: the gradient of loss and logits with respect to their
output is zero in all other rows, and of the first input row alone they make the same first output row. The block then
hands on its first row only, so that a reader of another one fails, rather than getting a wrong value.

The numbers are those of the whole computation but for rounding: sums over fewer rows are taken in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class _FirstRow(nn.Module):
    """Calls a module with the first row (B, 1, D) alone and fills the others up with zeros; or cuts its output.

    Shares the module's parameters and children, so that all keep their names.
    """

    def __init__(self, inner: nn.Module, cut: bool) -> None:
        super().__init__()
        self.__dict__.update(inner=inner, cut=cut, training=inner.training)
        for shared in ("_parameters", "_buffers", "_modules"):
            self.__dict__[shared] = getattr(inner, shared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def train(self, mode: bool = True) -> "_FirstRow":
        """Also of the module itself, which is no child."""
        self.inner.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module takes."""
        if self.cut:
            output = self.inner(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            return (first[:, :1], *output[1:]) if isinstance(output, tuple) else first[:, :1]
        first = self.inner(args[0][:, :1])
        return nn.functional.pad(first, (0, 0, 0, args[0].shape[1] - 1))


def skip_unread(model: nn.Module, last: str, batch: dict[str, torch.Tensor]) -> dict[str, nn.Module]:
    """Narrow the modules of the block `last` of which `batch` reads the first row only; none if it reads others.

    Returns:
        The modules whose place was taken, by name in the order in which `restore_modules` takes them.
    """
    with _calls(model, last) as calls:
        output = model(**batch)
    if not calls.get(last):
        return {}
    logits = output.logits.float()
    generator = torch.Generator().manual_seed(0)
    read = output.loss.float() + (logits * torch.randn(logits.shape, generator=generator).to(logits.device)).sum()
    found = {name: pair for name, pair in calls.items() if pair and pair[1].requires_grad}
    gradients = torch.autograd.grad(read, [out for _, out in found.values()], allow_unused=True)
    unread = {name for name, g in zip(found, gradients, strict=True) if g is not None and not g[:, 1:].any()}
    if last not in unread:
        return {}
    taken: dict[str, nn.Module] = {}
    for name in found:  # outer modules come first
        module = model.get_submodule(name)
        inside = any(name.startswith(f"{outer}.") for outer in taken)
        if name != last and name in unread and not inside and _by_rows(module, *found[name]):
            taken[name] = module
    for name, module in (*taken.items(), (last, model.get_submodule(last))):
        model.set_submodule(name, _FirstRow(module, cut=name == last))
        taken[name] = module
    return taken


def restore_modules(model: nn.Module, taken: dict[str, nn.Module]) -> None:
    """Undo `skip_unread`."""
    for name, module in taken.items():
        model.set_submodule(name, module)


@contextmanager
def _calls(model: nn.Module, last: str) -> Iterator[dict[str, Any]]:
    """Input and output of every module in a block that has parameters, if it is called once; outer modules first."""
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
def _by_rows(module: nn.Module, values: torch.Tensor, output: torch.Tensor) -> bool:
    """True if the first output row is made of the first input row alone, and nothing but one tensor is given."""
    try:
        first = module(values[:, :1])
    except Exception:  # it wants a mask or positions, or all rows: a module of unknown code may raise anything
        return False
    return isinstance(first, torch.Tensor) and torch.allclose(
        first.float(), output[:, :1].float(), rtol=1e-2, atol=1e-3
    )
