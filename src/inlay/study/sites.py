"""Where a method attaches, limited to some blocks of a base, and to their attention or MLP layers."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from peft import PeftConfig, get_peft_model
from torch import nn

from inlay.bases.sites import Sites, sites
from inlay.errors import BadInput, Unsupported
from inlay.measure.macs import copy_to_meta
from inlay.methods import CompositeConfig, PartialConfig
from inlay.methods._peft import check_target_module_exists
from inlay.methods.base import name_only
from inlay.study.trial import Modules


def narrow_sites(
    config: PeftConfig | None, model: nn.Module, blocks: Sequence[int] | None = None, modules: Modules = "all"
) -> PeftConfig | None:
    """The config of a method that attaches to some blocks only, and there to attention or MLP layers only.

    What the method adapts outside the blocks (embeddings, the last norm, a mask decoder) is left out with the blocks
    that are not chosen. `partial` of METHODS then trains the chosen blocks instead of the last one.

    Args:
        config: As a row of METHODS makes it for this model, which is None where it adds nothing; it is not changed.
        model: A transformers model without an adapter, which may be on the meta device.
        blocks: Numbers, from 0, of `sites(model).blocks`; None: all.
        modules: `attention` and `mlp` are the modules that `sites` names so, with all that is in them.

    Returns:
        A config whose `target_modules` are full names of modules, or a pattern of these.

    Raises:
        InlayError: The method adds nothing, attaches to the input or to whole parts of a model, or to nothing of the
            kind in these blocks; a number that no block has.
    """
    if blocks is None and modules == "all":
        return config
    if config is None:
        raise Unsupported("what adds nothing to a model has no places; leave blocks and modules out.")
    name = config.peft_type.value
    if modules not in ("all", "attention", "mlp"):
        raise BadInput(f"modules must be all, attention or mlp, got {modules!r}.")
    if config.is_prompt_learning:
        raise Unsupported(
            f"{name} is one table of tokens for the whole model, so it has no blocks to choose; leave blocks and "
            "modules out."
        )
    if isinstance(config, CompositeConfig):
        return replace(config, parts=[narrow_sites(part, model, blocks, modules) for part in config.parts])
    if isinstance(config, PartialConfig) and blocks is not None:
        config = replace(config, last=None)
    found = sites(model)
    targets = list_targets(config, model)
    within = _beginnings(_choose_blocks(found, blocks))
    if not any(f"{target}.".startswith(_beginnings(found.blocks)) for target in targets):
        raise Unsupported(
            f"{name} attaches to {', '.join(targets)}, not to blocks of {type(model).__name__}; leave blocks and "
            "modules out."
        )
    kept = [target for target in targets if f"{target}.".startswith(within)]
    if modules != "all":
        layers = _beginnings(list_modules(found)[modules])
        kept = [target for target in kept if f"{target}.".startswith(layers)]
    if not kept:
        what = "layers" if modules == "all" else f"{modules} layers"
        where = "any block" if blocks is None else f"blocks {list(blocks)}"
        raise Unsupported(f"{name} attaches to no {what} in {where} of {type(model).__name__}; choose other places.")
    changes = {"target_modules": name_only(kept, model)}
    if isinstance(getattr(config, "feedforward_modules", None), set):  # of (IA)³, a part of its targets
        changes["feedforward_modules"] = [target for target in kept if target in config.feedforward_modules]
    return replace(config, **changes)


def list_targets(config: PeftConfig, model: nn.Module) -> list[str]:
    """Full names of the modules that a method wraps in a model, which is not changed.

    Raises:
        InlayError: The method does not fit the model.
    """
    if config.target_modules is not None:
        return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    # The method chooses by itself, so it is put into a copy that holds no values.
    adapted = get_peft_model(copy_to_meta(model), copy.deepcopy(config))
    return list(adapted.base_model.targeted_module_names)


def _choose_blocks(found: Sites, blocks: Sequence[int] | None) -> Sequence[str]:
    if blocks is None:
        return found.blocks
    wrong = [i for i in blocks if not 0 <= i < len(found.blocks)]
    if wrong or not blocks:
        raise BadInput(f"blocks must be numbers within 0 to {len(found.blocks) - 1}, got {list(blocks)}.")
    return [found.blocks[i] for i in blocks]


def list_modules(found: Sites) -> dict[str, tuple[str, ...]]:
    """What belongs to the attention, and what to the MLP, of all blocks: names of modules, and of parts of these."""
    attention = (found.attention, found.around_attention, found.q, found.k, found.v, found.out)
    mlp = (found.around_mlp, found.mlp_in, found.mlp_out)
    return {"attention": sum(attention, ()), "mlp": sum(mlp, ())}


def _beginnings(names: Sequence[str]) -> tuple[str, ...]:
    """Of the names of modules and of all in them, with a dot behind each."""
    return tuple(f"{name}." for name in names)
