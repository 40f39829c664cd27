"""Logits of a causal language model in chunks of tokens, of which the whole would be the largest tensor of a step.

A model is its body and what follows it: the head, with the adapters in it, and a scale or a soft cap of the logits. The
body runs once. What follows it runs for each chunk, through the model's own code.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cross_entropy, pad
from transformers.utils import ModelOutput

from inlay.tasks.text.vocabulary import vocabulary_of
from inlay.train.sharding import is_sharded

IGNORED = -100  # the label of tokens that are read and not learned: prompts, padding
CHUNK = 2**24  # logits that are computed together: 64 MB in float32, and as much again two or three times for the loss

Tail = Callable[[Tensor], Tensor]

# Whether what follows the body of a model gives the model's own logits; found out at the first batch.
_agrees: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class LearnedTokens(NamedTuple):
    """The tokens with a label, where the model has read what is before them.

    Attributes:
        states: Last hidden states (N, D).
        labels: (N,).
        tail: Computes the logits (n, V) of states (n, D).
        parameters: Of the model.
    """

    states: Tensor
    labels: Tensor
    tail: Tail
    parameters: list[nn.Parameter]

    def chunks(self, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
        """States and labels of as many tokens as have CHUNK logits together."""
        size = max(1, CHUNK // vocabulary)
        yield from zip(self.states.split(size), self.labels.split(size), strict=True)


def can_split(model: nn.Module) -> bool:
    """True if the model, under its wrappers, has a body that can be run without its head.

    Weights in shards are gathered by all processes at once, but each has a number of chunks of its own.
    """
    if is_sharded(model):
        return False
    inner = unwrap(model)
    wrappers = (model, getattr(model, "module", model), inner)
    compiled = any(getattr(each, "_compiled_call_impl", None) or hasattr(each, "_orig_mod") for each in wrappers)
    return isinstance(_find_body(inner), nn.Module) and not compiled and _agrees.get(inner, True)


def unwrap(model: nn.Module) -> Any:
    """The model of transformers under DistributedDataParallel and peft."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def run_in_chunks(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor, places: Tensor, use: Callable[[LearnedTokens], Any]
) -> Any:
    """Run the model, with `use` in the place of its head; None where the model cannot be split after all.

    `use` runs inside the model's forward, so under its autocast.

    Args:
        model: As passed to `fit`.
        inputs: Of its forward, for T tokens in B rows.
        labels: (B, T - 1): of a column, the token that follows it, or IGNORED.
        places: (N,): of the B*T tokens those whose next one is learned; at least one.
        use: Is given the learned tokens.
    """
    inner = unwrap(model)
    known = inner in _agrees or isinstance(next(inner.parameters()), FakeTensor)  # fake tensors cannot be compared
    found: list[Any] = []
    expected: list[Tensor] = []

    def use_states(body: nn.Module, args: Any, output: Any) -> Any:
        handle.remove()  # the body is called again for each chunk
        if not _has_states(output):
            return None
        states = output.last_hidden_state[:, -labels.shape[1] - 1 :]  # B T D; a learned prompt stands in front
        next_labels = pad(labels, (0, 1), value=IGNORED).flatten()  # B*T
        with _replacing_body(inner, body, output) as tail:
            rows = states.flatten(0, 1)[places]  # N D
            found.append(use(LearnedTokens(rows, next_labels[places], tail, list(inner.parameters()))))
            if not known:
                with _keeping_random_state():  # dropout in the head then draws the same once more
                    expected.append(tail(states[0, -1:]))
        return _replace_states(output, states[:1, -1:])  # the logits of one token, which nothing reads

    handle = _find_body(inner).register_forward_hook(use_states)
    try:
        with _keeping_random_state(not known):
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if not known:
        one = bool(found) and logits.shape[:2] == (1, 1)
        _agrees[inner] = one and torch.allclose(logits[0].float(), expected[0].float(), rtol=1e-3, atol=1e-3)
        if not _agrees[inner]:
            return None
    return found[0]


def sum_losses(tokens: LearnedTokens, vocabulary: int, smoothing: float) -> Tensor:
    """The cross-entropy of all tokens, added up, with its gradients.

    The gradients of a chunk are computed with its loss, while its logits are there. So nothing is computed twice.

    Args:
        tokens: Of `run_in_chunks`.
        vocabulary: Logits of a token.
        smoothing: Label smoothing.

    Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2 (`torch.nn.functional.linear_cross_entropy` in torch 2.13,
    which knows neither adapters in the head, nor label smoothing, nor soft caps).
    """
    trained = [p for p in tokens.parameters if p.requires_grad] if torch.is_grad_enabled() else []
    total = tokens.states.new_zeros((), dtype=torch.promote_types(tokens.states.dtype, torch.float32))
    of_states: list[Tensor] = []
    of_parameters: dict[nn.Parameter, Tensor] = {}
    # In float16 the gradient of an unlikely token would be zero; accelerate's scaler comes too late for it.
    scale = 256.0 if _computes_in_half(tokens.states) else 1.0
    for states, labels in tokens.chunks(vocabulary):
        own = states.detach().requires_grad_(tokens.states.requires_grad)
        loss = cross_entropy(_widen(tokens.tail(own)), labels, reduction="sum", label_smoothing=smoothing)
        total += loss.detach()
        if not loss.requires_grad:
            continue
        leaves = [*([own] if own.requires_grad else []), *trained]
        gradients = dict(zip(leaves, torch.autograd.grad(loss * scale, leaves, allow_unused=True), strict=True))
        if own.requires_grad:
            of_states.append(gradients.pop(own))
        for parameter, gradient in gradients.items():
            if gradient is not None:
                known = of_parameters.get(parameter)
                of_parameters[parameter] = gradient if known is None else known.add_(gradient)
    sources = [*([tokens.states] if of_states else []), *of_parameters]
    known_gradients = [*([torch.cat(of_states)] if of_states else []), *of_parameters.values()]
    return _KnownGradients.apply(total, known_gradients, scale, *sources)


def read_logits(model: nn.Module, batch: dict[str, Any], read: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """What `read(logits, labels)` returns of chunks of the learned tokens, (n, V) and (n,), in the order of the batch.

    For models that are not being trained: call it without gradients. There is at least one chunk.
    """
    labels = batch["labels"][:, 1:]
    columns = labels != IGNORED
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    vocabulary = vocabulary_of(unwrap(model))
    if not columns.any():
        return [read(torch.zeros(0, vocabulary, device=labels.device), labels[columns])]

    def read_chunks(tokens: LearnedTokens) -> list[Any]:
        return [read(_widen(tokens.tail(states)), labels) for states, labels in tokens.chunks(vocabulary)]

    places = pad(columns, (0, 1)).flatten().nonzero()[:, 0]
    found = run_in_chunks(model, inputs, labels, places, read_chunks) if can_split(model) else None
    if found is None:
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] - 1 : -1]
        return [read(_widen(logits[columns]), labels[columns])]
    return found


class _KnownGradients(torch.autograd.Function):
    """A number with gradients that are already known, of the tensors behind them; they hold `scale` times too much."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], scale: float, *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        factor = upstream[0] / ctx.scale
        return None, None, None, *(each * factor for each in ctx.gradients)


def _widen(logits: Tensor) -> Tensor:
    """In float32 at least, as the loss is computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _computes_in_half(states: Tensor) -> bool:
    device = states.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return half or states.dtype == torch.float16


def _find_body(inner: Any) -> Any:
    """The module that computes the last hidden states of a causal language model; None of another model."""
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return None if body is inner else body


def _has_states(output: Any) -> bool:
    return isinstance(output, ModelOutput) and getattr(output, "last_hidden_state", None) is not None


def _replace_states(output: Any, states: Tensor) -> Any:
    changed = copy.copy(output)
    changed["last_hidden_state"] = states
    return changed


@contextmanager
def _replacing_body(inner: Any, body: nn.Module, output: Any) -> Iterator[Tail]:
    """A block in which the model's forward takes given hidden states for those of its body."""
    given: list[Tensor] = []
    before = {name: value for name, value in vars(body).items() if name == "forward"}
    needs_cache_switch = "use_cache" in inspect.signature(type(inner).forward).parameters
    further = {"use_cache": False} if needs_cache_switch else {}

    def tail(states: Tensor) -> Tensor:
        given[:] = [states[None]]
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return inner.forward(input_ids=ids, **further).logits[0]

    body.forward = lambda *args, **kwargs: _replace_states(output, given[0])
    try:
        yield tail
    finally:
        del body.forward
        vars(body).update(before)


@contextmanager
def _keeping_random_state(wanted: bool = True) -> Iterator[None]:
    """A block after which the generators go on as if nothing had been drawn in it."""
    devices = range(torch.cuda.device_count()) if wanted and torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices, enabled=wanted):
        yield
