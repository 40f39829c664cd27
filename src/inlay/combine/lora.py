"""Sums of LoRA: exact by concatenation, smaller by an SVD of the factors, other rules on ΔW module by module.

A rule may also scale the columns of each A, an input (of a convolution a channel) each, before the concatenation.

The scale (alpha / r, or alpha / √r with rsLoRA) and the weight go into B, so that the result is a plain LoRA with
alpha = r. Modules may have different ranks, and one adapter may have modules that others lack.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.blocks import Blocks, multiply_factors, split_rows
from inlay.combine.low_rank import Spectrum, choose_ranks, decompose_factors, fit_factors
from inlay.combine.method_sum import Leaves, Sum, Update, is_ending, make_common_config, require_equal_settings
from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part
from inlay.combine.rules import merge_in_blocks
from inlay.errors import BadInput, DamagedFile, Unsupported, WrongBase
from inlay.peft_types import base_changing_init

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
# Settings that do not change what a saved adapter computes, or that are taken into account here.
_UNDERSTOOD = frozenset(
    """
    peft_type task_type inference_mode base_model_name_or_path revision auto_mapping peft_version r lora_alpha
    target_modules exclude_modules lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern lora_bias qalora_group_size megatron_core
    loftq_config eva_config corda_config lora_ga_config runtime_config ensure_weight_tying use_dora
    """.split()  # noqa: SIM905
)


def scale_at(part: Part, site: str) -> float:
    """What B·A of a module is multiplied with in peft."""
    rank = part.shape(site, _name_leaves(part, site)[0])[0]
    alpha = part.config.get("lora_alpha", 8)
    for pattern, value in (part.config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if part.config.get("use_rslora") else rank)


def read_factors(part: Part, site: str) -> tuple[Array, Array]:
    """B (d_out, r), with the scale but without the weight in it, and A (r, d_in); kernels of convolutions are flat."""
    down, up = (part.read(site, leaf) for leaf in _name_leaves(part, site))
    return up.reshape(len(up), -1) * np.float32(scale_at(part, site)), down.reshape(len(down), -1)


def count_groups(part: Part, site: str) -> int:
    """Groups of a convolution, each with units of its own: peft's B sees only those of its group."""
    down, up = (part.shape(site, leaf) for leaf in _name_leaves(part, site))
    return down[0] // up[1] if len(up) > 2 else 1


def _split_by_group(pair: tuple[Array, Array], groups: int) -> list[tuple[Array, Array]]:
    """B (d_out / G, r / G) and A (r / G, d_in) of each group; of anything but such a convolution there is one."""
    return list(zip(np.split(pair[0], groups), np.split(pair[1], groups), strict=True))


def _name_leaves(part: Part, site: str) -> tuple[str, str]:
    return _EMBEDDING if _EMBEDDING[0] in part.sites[site] else _LINEAR


class LoraSum(Sum):
    """Several LoRAs as one."""

    peft_type = "LORA"
    key_prefix = "lora_"
    title = "LoRA"
    has_updates = True

    @override
    def decide_config(self) -> dict[str, Any]:
        for part in self.parts:
            _check_part(part)
        if any(
            _name_leaves(part, site) == _EMBEDDING or site.endswith("lm_head")
            for part in self.parts
            for site in part.sites
        ):
            require_equal_settings(
                "LoRA",
                self.parts,
                ["ensure_weight_tying"],
                "one adapts two tied modules as one, the other each by itself",
            )
        self._memory: dict[str, Array] = {}
        self.biased = any(part.config.get("lora_bias") for part in self.parts)
        self.ranks = self._decide_ranks()
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        others = {self._make_pattern(site): rank for site, rank in self.ranks.items() if rank != usual}
        return make_common_config(
            self.parts,
            self.names,
            r=usual,
            lora_alpha=usual,
            rank_pattern=others,
            alpha_pattern=dict(others),
            use_rslora=False,
            lora_bias=self.biased,
            loftq_config={},
            init_lora_weights=True,
        )

    def _make_pattern(self, site: str) -> str:
        """A site in rank_pattern, which peft also matches with the ends of names."""
        return ("^" if is_ending(site, self.names) else "") + re.escape(site)

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        up, down = read_factors(part, site)
        grouped = up.shape[1] != down.shape[0]  # the units of a convolution in groups have no common product
        return None if grouped else (up * np.float32(part.weight), down)

    @property
    @override
    def width(self) -> int:
        return max(self.ranks.values())

    def _decide_ranks(self) -> dict[str, int]:
        width = self.options.width
        full = {
            site: sum(p.shape(site, _name_leaves(p, site)[0])[0] for p in self.acting_parts(site))
            for site in self.names
        }
        if width is None:
            return full
        groups = {site: self._count_groups(site) for site in self.names}
        most = {site: min(full[site] // n, *self._count_features(site)) for site, n in groups.items()}  # of a group
        if width != "auto":
            if width < max(groups.values()):
                site = max(groups, key=lambda name: groups[name])
                raise BadInput(
                    f"{site} is a convolution in {groups[site]} groups, each with units of its own; give at least that "
                    "width."
                )
            return {site: n * min(width // n, most[site]) for site, n in groups.items()}
        if self.options.rule.merge is not None:
            raise BadInput('width="auto" is for add and average; give a number with the other rules.')
        values = {site: [found.values[: most[site]] for found in self._decompose_sum(site)] for site in self.names}
        return choose_ranks(values, self.options.error)

    def _count_features(self, site: str) -> tuple[int, int]:
        """d_out and d_in, of a group."""
        part = self.acting_parts(site)[0]
        down, up = (part.shape(site, leaf) for leaf in _name_leaves(part, site))
        return up[0] // self._count_groups(site), math.prod(down[1:])

    def _count_groups(self, site: str) -> int:
        return count_groups(self.acting_parts(site)[0], site)

    @override
    def shapes_at(self, site: str) -> Leaves:
        here = self.acting_parts(site)
        if len({_name_leaves(part, site) for part in here}) > 1:
            raise WrongBase(f"{site} is an embedding in one adapter and none in another; combine those of one base.")
        (a, b), rank = _name_leaves(here[0], site), self.ranks[site]
        downs, ups = ({p.name: (p.shape(site, leaf)) for p in here} for leaf in (a, b))
        sizes = {(down[1:], up[:1], up[2:]) for down, up in zip(downs.values(), ups.values(), strict=True)}
        if len(sizes) > 1:
            raise WrongBase(f"{site}.{a} is {downs}, {b} {ups}; only adapters of one base can be combined.")
        down, up = downs[here[0].name], ups[here[0].name]
        shapes = {a: (rank, *down[1:]), b: (up[0], rank // self._count_groups(site), *up[2:])}
        if self.biased and a == _LINEAR[0]:
            shapes[_BIAS] = up[:1]
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, shapes = self.acting_parts(site), self.shapes[site]
        a, b = _name_leaves(here[0], site)
        if self.options.rule.merge is not None:
            up, down = self._merge_updates(site)
        elif self.options.width is not None:
            up, down = self._cut_update(site, self._decompose_sum(site))
        else:
            up, down = self._join_units(site)
            self.errors[site] = 0.0
        made = {a: down.reshape(shapes[a]), b: up.reshape(shapes[b])}
        if _BIAS in shapes:
            made[_BIAS] = self._sum_biases(site)
        return made

    def _scale_inputs(self, site: str) -> list[Array | None]:
        """What each part's A is multiplied with, by the rule: a factor for each input (channel); None: with nothing."""
        here, scale = self.acting_parts(site), self.options.rule.scale
        if scale is None:
            return [None] * len(here)
        (_, channels, *size), groups = here[0].shape(site, _name_leaves(here[0], site)[0]), self._count_groups(site)
        pairs = [_split_by_group(read_factors(part, site), groups) for part in here]
        grams = np.zeros((channels, len(here), len(here)))
        for i, j in product(range(len(here)), repeat=2):  # (B_i A_i)ᵀ B_j A_j, its diagonal only
            for (up, down), (other_up, other_down) in zip(pairs[i], pairs[j], strict=True):
                inner = here[i].weight * here[j].weight * (up.T.astype(np.float64) @ other_up)
                grams[:, i, j] += (down * (inner @ other_down)).sum(0).reshape(channels, -1).sum(1)
        return [factors.astype(np.float32).reshape(1, channels, *[1] * len(size)) for factors in scale(grams).T]

    def _join_units(self, site: str) -> tuple[Array, Array]:
        """B and A with the units of all; those of a convolution in groups stand group by group."""
        here, shapes = self.acting_parts(site), self.shapes[site]
        a, b = _name_leaves(here[0], site)
        down, up = self._take_memory("down", shapes[a]), self._take_memory("up", shapes[b])
        groups = len(down) // up.shape[1]
        rows = down.reshape(groups, -1, *shapes[a][1:])
        probe = _draw_input(math.prod(shapes[a][1:]))
        wanted, at = np.zeros((groups, len(up) // groups)), 0
        for part, factors in zip(here, self._scale_inputs(site), strict=True):
            width = part.shape(site, a)[0] // groups
            piece, factor = rows[:, at : at + width], part.weight * scale_at(part, site)
            if groups == 1:
                part.tensors.read_into(part.sites[site][a], piece[0])
            else:
                piece[...] = part.read(site, a).reshape(piece.shape)
            if factors is not None:
                piece *= factors
            own = self._take_memory("own", part.shape(site, b))
            part.tensors.read_into(part.sites[site][b], own)
            hidden = piece.reshape(groups, width, -1) @ probe  # G w
            wanted += factor * (own.reshape(groups, -1, width) @ hidden[..., None])[..., 0]
            np.multiply(own, np.float32(factor), out=up[:, at : at + width])
            at += width
        hidden = rows.reshape(groups, at, -1) @ probe
        found = (up.reshape(groups, -1, at) @ hidden[..., None])[..., 0]  # G d_out/G
        with np.errstate(over="ignore"):  # of what is no sum in float32; writing it is refused
            size = float(np.linalg.norm(up)) * norm(hidden)  # where terms cancel, rounding is as large as they are
        self.check(site, found, wanted, max(norm(wanted), size))
        return up, down

    def _take_memory(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array in the memory of the last one of this name: fresh memory costs more than what is done in it."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.empty(size, np.float32)
        return self._memory[name][:size].reshape(shape)

    def _decompose_sum(self, site: str) -> list[Spectrum]:
        """Of the exact sum, with the weights in B, group by group; kernels of convolutions are flat."""
        groups = self._count_groups(site)
        parts = []
        for part, factors in zip(self.acting_parts(site), self._scale_inputs(site), strict=True):
            up, down = read_factors(part, site)
            if factors is not None:
                shape = part.shape(site, _name_leaves(part, site)[0])
                down = (down.reshape(shape) * factors).reshape(down.shape)
            parts.append((_split_by_group((up, down), groups), np.float32(part.weight)))
        found = []
        for k in range(groups):
            up = np.concatenate([weight * own[k][0] for own, weight in parts], axis=1)
            found.append(decompose_factors(up, np.concatenate([own[k][1] for own, _ in parts])))
        return found

    def _cut_update(self, site: str, spectra: Sequence[Spectrum]) -> tuple[Array, Array]:
        """B and A of the best update of the width, with its error; what is cut off is orthogonal to what stays."""
        rank = self.ranks[site] // len(spectra)
        made = [found.cut(rank) for found in spectra]
        probe = _draw_input(spectra[0].down.shape[1])
        for whole, (up, down) in zip(spectra, made, strict=True):
            wanted, found = whole.up @ (whole.down @ probe), up @ (down @ probe)
            self.check(site, up.T @ found, up.T @ wanted, norm(up) * max(norm(wanted), norm(found)))
        self._record_loss(site, [norm(s.values[rank:]) for s in spectra], [norm(s.values) for s in spectra])
        return np.concatenate([up for up, _ in made]), np.concatenate([down for _, down in made])

    def _record_loss(self, site: str, lost: Sequence[float], sizes: Sequence[float]) -> None:
        """Keep the error and the size of the update, from those of its groups."""
        self.norms[site] = math.hypot(*sizes)
        self.errors[site] = math.hypot(*lost) / self.norms[site] if self.norms[site] else 0.0

    def _merge_updates(self, site: str) -> tuple[Array, Array]:
        """A rule on the true updates, and the best update of the width for what it gives."""
        here, groups = self.acting_parts(site), self._count_groups(site)
        pairs = [_split_by_group(read_factors(part, site), groups) for part in here]
        if self.options.rule.needs_factors:
            return self._cut_update(
                site, [decompose_factors(*self._merge_in_shared_basis(site, own)) for own in zip(*pairs, strict=True)]
            )
        rows, columns = self._count_features(site)
        flip = rows < columns  # ΔWᵀ has a smaller space of rows
        made = [
            fit_factors(blocks, self.ranks[site] // groups) for blocks in self._merge_blocks(here, pairs, site, flip)
        ]
        self._record_loss(site, [fit.error * fit.norm for fit in made], [fit.norm for fit in made])
        for fit in made:
            self.check(site, np.array(fit.slope), np.zeros(()), norm(fit.up) * fit.norm)
        found = [(fit.down.T, fit.up.T) if flip else (fit.up, fit.down) for fit in made]
        return np.concatenate([up for up, _ in found]), np.concatenate([down for _, down in found])

    def _merge_blocks(
        self, here: Sequence[Part], pairs: Sequence[Sequence[tuple[Array, Array]]], site: str, flip: bool
    ) -> list[Blocks]:
        """What the rule makes of each group of the module; transposed if `flip`."""
        rule, settings, weights = self.options.rule, self.options.settings, [part.weight for part in here]
        if rule.merge_trimmed is not None and len(pairs[0]) == 1:
            factors = [(down.T, up.T) if flip else (up, down) for ((up, down),) in pairs]
            return [merge_in_blocks(rule, [multiply_factors(*own) for own in factors], weights, settings)]
        assert rule.merge is not None
        deltas = [np.concatenate([up @ down for up, down in own]) for own in pairs]
        whole = np.split(rule.merge(deltas, weights, settings, site), len(pairs[0]))
        return [split_rows(dense.T if flip else dense) for dense in whole]

    def _merge_in_shared_basis(self, site: str, pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        """[ΔW_1, ..., ΔW_n] = U S [V_1, ..., V_n]ᵀ; the rule on the V_i, between U S and nothing: no ΔW is formed."""
        merge = self.options.rule.merge
        assert merge is not None
        basis, tall = np.linalg.qr(np.concatenate([up for up, _ in pairs], axis=1))
        ends = np.cumsum([up.shape[1] for up, _ in pairs])[:-1]
        cores = [r @ down for r, (_, down) in zip(np.split(tall, ends, axis=1), pairs, strict=True)]
        u, s, v = np.linalg.svd(np.concatenate(cores, axis=1), full_matrices=False)
        real = s > 1e-5 * s[0]  # other directions are rounding, and would take the place of entries that count
        u, s, v = u[:, real], s[real], v[real]
        own = [np.ascontiguousarray(x, np.float32) for x in np.split(v, len(pairs), axis=1)]
        merged = merge(own, [part.weight for part in self.acting_parts(site)], self.options.settings, site)
        return (basis @ u * s).astype(np.float32), merged

    def _sum_biases(self, site: str) -> Array:
        """Of B: it is scaled as B·A is."""
        here = [part for part in self.acting_parts(site) if _BIAS in part.sites[site]]
        total = np.zeros(self.shapes[site][_BIAS], np.float32)
        biases = [part.read(site, _BIAS) * np.float32(scale_at(part, site)) for part in here]
        rule = self.options.rule
        if rule.merge is not None and biases:
            return rule.merge(biases, [p.weight for p in here], self.options.settings, f"{site}.bias")
        biases = [np.float32(part.weight) * bias for part, bias in zip(here, biases, strict=True)]
        if rule.scale is not None and biases:  # the column of an input that is always 1
            stacked = np.stack(biases).astype(np.float64)
            factors = rule.scale((stacked @ stacked.T)[None])[0]
            biases = [np.float32(factor) * bias for factor, bias in zip(factors, biases, strict=True)]
        for bias in biases:
            total += bias
        return total


@cache
def _draw_input(size: int) -> Array:
    """A random input, the same one each time."""
    return np.random.default_rng(size).standard_normal(size, np.float32)


def _check_part(part: Part) -> None:
    """That a sum of these is the sum of their effects."""
    config, name = part.config, part.name
    if config.get("use_dora"):
        raise Unsupported(
            f"adapter {name!r} is a DoRA, whose magnitudes depend on the base's weights, so that updates do not add; "
            "use dense=True, which takes the base and gives the sum as a partial delta."
        )
    if init := base_changing_init(config):
        raise Unsupported(
            f"adapter {name!r} was initialised by {init!r}, which changes the base; make it a plain one with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    if config.get("bias", "none") != "none":
        raise Unsupported(
            f"adapter {name!r} was trained with bias={config['bias']!r}, biases of the base; use lora_bias."
        )
    strange = [key for key, value in config.items() if key not in _UNDERSTOOD and value]
    leaves = {leaf for site in part.sites.values() for leaf in site} - {*_LINEAR, *_EMBEDDING, _BIAS}
    if strange or leaves:
        raise Unsupported(
            f"adapter {name!r} is a kind of LoRA that does not add as B·A does ({', '.join([*strange, *leaves])}); "
            "use dense=True, which takes the base and gives the sum as a partial delta."
        )
    for site in part.sites:
        missing = [leaf for leaf in _name_leaves(part, site) if leaf not in part.sites[site]]
        if missing:
            raise DamagedFile(f"adapter {name!r} lacks {site}.{missing[0]}; download it again.")
        down, up = (part.shape(site, leaf) for leaf in _name_leaves(part, site))
        if len(down) < 2 or len(down) != len(up) or 0 in (*down, *up) or down[0] % up[1]:
            raise DamagedFile(
                f"adapter {name!r} has A {down} and B {up} at {site}, which have no product; download it again."
            )
        if not math.isfinite(scale_at(part, site)):
            raise DamagedFile(f"adapter {name!r} has no finite scale at {site}; download it again.")
    if not part.sites:
        raise DamagedFile(f"adapter {name!r} holds no LoRA tensor; download it again.")
