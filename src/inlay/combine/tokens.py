"""Sums that are unions (prefixes and prompts share their attention), and sums of plain differences.

Prefixes and prompts: the softmax then runs over the keys of all. A multiple of a key has no such meaning, so the
weights are 1, or 0 for an adapter that is left out. Partial fine-tuning: the differences to the base add. (IA)³: what
it multiplies with, less one, is a difference to the base's weights, row by row or column by column, and adds too.
"""

from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.low_rank import norm
from inlay.combine.method_sum import Leaves, Sum, agree, common, same
from inlay.combine.read import PROMPTS, Array
from inlay.errors import InlayError


class UnionSum(Sum):
    """Tokens, or keys and values, of all adapters, one after the other."""

    weighs = False
    length = "length"

    @override
    def settle(self) -> dict[str, Any]:
        self.refuse_width("cannot be made shorter without data")
        self.extra()
        lengths = {sum(p.shape(site, next(iter(p.sites[site])))[0] for p in self.acting(site)) for site in self.names}
        if len(lengths) > 1:
            raise InlayError(
                f"{self.method} has one length at all its modules, but the union would have {sorted(lengths)} in "
                "different ones; combine adapters of the same modules."
            )
        return self.settings(lengths.pop())

    def extra(self) -> None:
        """What has to be the same for a union to be one."""

    def settings(self, length: int) -> dict[str, Any]:
        """The config for so many."""
        return common(self.parts, self.names, **{self.length: length})

    @override
    def layout(self, site: str) -> Leaves:
        here, shapes = self.acting(site), {}
        for leaf in here[0].sites[site]:
            if len({part.shape(site, leaf)[1:] for part in here if leaf in part.sites[site]}) > 1:
                raise InlayError(f"{site}.{leaf} has other sizes in other adapters; combine those of one base.")
            shapes[leaf] = (sum(part.shape(site, leaf)[0] for part in here), *here[0].shape(site, leaf)[1:])
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, made = self.acting(site), {}
        for leaf, shape in self.shapes[site].items():
            made[leaf] = np.empty(shape, np.float32)
            at = 0
            for part in here:
                rows = part.shape(site, leaf)[0]
                part.tensors.into(part.sites[site][leaf], made[leaf][at : at + rows])
                at += rows
        self.errors[site] = 0.0
        return made


class AttentionPrefixSum(UnionSum):
    """Keys and values in front of those of the tokens."""

    method = "an attention prefix"

    @override
    def extra(self) -> None:
        if all(part.weight == 0 for part in self.parts):
            raise InlayError("a prefix of length 0 cannot be saved: give one adapter the weight 1.")

    @override
    def settings(self, length: int) -> dict[str, Any]:
        return common(self.parts, self.names, length=length, projection=None)


class VisualPromptSum(AttentionPrefixSum):
    """Tokens beside those of the picture; of shallow ones the first block has them all."""

    method = "a visual prompt"

    @override
    def extra(self) -> None:
        super().extra()
        agree("visual prompts", self.parts, ["deep"], "shallow ones travel, deep ones do not")
        self.blocks = list(self.parts[0].config.get("target_modules") or [])
        if not self.parts[0].config.get("deep", True):
            agree("shallow visual prompts", self.parts, ["target_modules"], "they travel through the same blocks")
        else:
            self.blocks = self.names

    @override
    def settings(self, length: int) -> dict[str, Any]:
        return common(self.parts, self.blocks, length=length)


class PeftPromptSum(AttentionPrefixSum):
    """peft's own prompts and prefixes for language models, one table for the whole model."""

    method = "a prompt"

    @override
    def extra(self) -> None:
        super().extra()
        fields = ["token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"]
        agree("prompts", self.parts, fields, "only adapters of one base can be combined")
        if self.names != [""] or (self.parts[0].config.get("num_transformer_submodules") or 1) != 1:
            raise InlayError("prompts of encoder-decoder models cannot be combined: their table has one part for each.")
        for part in self.parts:
            rows, said = part.shape("", PROMPTS)[0], part.config.get("num_virtual_tokens")
            if rows != said:
                raise InlayError(
                    f"adapter {part.name!r} holds {rows} tokens, but its config says {said}; get it again."
                )

    @override
    def settings(self, length: int) -> dict[str, Any]:
        config = {**self.parts[0].config, "num_virtual_tokens": length}
        return {**config, "prefix_projection": False} if "prefix_projection" in config else config


class DeltaSum(Sum):
    """Differences to the base's weights, as they are in partial fine-tuning."""

    method = "partial fine-tuning"
    merges = True
    start = 0.0  # what a tensor holds that changes nothing

    @override
    def settle(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        if self.plan.rule.paper.endswith("2410.19735"):
            raise InlayError("knots works on the factors of low-rank updates; use ties for differences of weights.")
        kinds = {str(part.config.get("train", "all")) for part in self.parts}
        train = kinds.pop() if len(kinds) == 1 else "all"
        if kinds:  # another one: the result names whole modules
            for site in self.names:
                leaves = {leaf for part in self.parts if site in part.sites for leaf in part.sites[site]}
                if leaves == {"inlay_partial_delta.bias"}:
                    raise InlayError(
                        f"{site} has its bias trained alone, other modules all of their weights, which one config "
                        "cannot say; combine adapters with the same train=."
                    )
        return common(self.parts, self.names, train=train, last=None)

    @override
    def layout(self, site: str) -> Leaves:
        here = [part for part in self.parts if site in part.sites]
        leaves = dict.fromkeys(leaf for part in here for leaf in part.sites[site])
        return {leaf: same([p for p in here if leaf in p.sites[site]], site, leaf) for leaf in leaves}

    @override
    def make(self, site: str) -> dict[str, Array]:
        return {leaf: self._added(site, leaf) for leaf in self.shapes[site]}

    def _added(self, site: str, leaf: str) -> Array:
        here = [part for part in self.acting(site) if leaf in part.sites[site]]
        self.errors[site] = 0.0
        if self.plan.rule.merge is not None and here:
            deltas = [part.read(site, leaf) - np.float32(self.start) for part in here]
            weights = [part.weight for part in here]
            merged = self.plan.rule.merge(deltas, weights, self.plan.settings, f"{site}.{leaf}")
            self.check(site, merged, merged)
            return merged + np.float32(self.start)
        total = np.zeros(self.shapes[site][leaf], np.float32)
        wanted = size = 0.0
        for part in here:
            if part.weight == 0:
                continue
            delta = part.read(site, leaf)
            delta -= np.float32(self.start)
            wanted += part.weight * _seen(delta)
            size += abs(part.weight) * norm(delta)
            delta *= np.float32(part.weight)
            total += delta
            del delta  # before the next one is there
        self.check(site, np.array(_seen(total)), np.array(wanted), size)
        total += np.float32(self.start)
        return total


def _seen(delta: Array) -> float:
    """One number that all entries go into, in float64 by pieces."""
    flat = delta.ravel()
    return float(sum(flat[i : i + 16384].sum(dtype=np.float64) for i in range(0, len(flat), 16384)))


class Ia3Sum(DeltaSum):
    """(IA)³: ΔW = (l - 1) W along rows, or W (l - 1) along columns before a feed-forward layer."""

    method = "(IA)³"
    start = 1.0

    @override
    def settle(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        if self.plan.rule.paper.endswith("2410.19735"):
            raise InlayError("knots works on the factors of low-rank updates; use ties for (IA)³.")
        agree("(IA)³ adapters", self.parts, ["fan_in_fan_out"], "only adapters of one base can be combined")
        forward = set()
        for site in self.names:
            said = {_is_forward(part, site) for part in self.parts if site in part.sites}
            if len(said) > 1:
                raise InlayError(
                    f"{site} is a feed-forward module in one adapter and none in another; these do not add."
                )
            forward |= {site} if said.pop() else set()
        return common(self.parts, self.names, feedforward_modules=sorted(forward))


def _is_forward(part: Any, site: str) -> bool:
    """As peft tells by names or their endings; by the shape of l, which is a row there, where it can be seen."""
    rows, columns = (*part.shape(site, "ia3_l"), 1)[:2]
    if rows != columns:
        return rows == 1
    named = part.config.get("feedforward_modules") or []
    return any(site == name or site.endswith(f".{name}") for name in ([named] if isinstance(named, str) else named))
