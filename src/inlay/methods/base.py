"""What the methods of this package share: a layer that wraps a module, and a tuner that puts it there.

peft's own base classes do most of it. Added are: layers around modules inside one another (a block, and a projection in
it), rows of one batch under different adapters, and merging by a new value for each weight, so that unmerging is exact.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from inlay.bases.batch_norm import freeze_statistics
from inlay.bases.sites import Sites, sites
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.methods._peft import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    LoraLayer,
    check_adapters_to_merge,
    layers_taken_out,
    name_import_in_card,
    name_in_base,
    take_layers_out,
    undo_layer_changes,
)

# Which adapters act on which rows of a batch: all active ones on all rows (None), or one each on some.
Groups = list[tuple[list[str], torch.Tensor | None]]


@dataclass
class AdapterConfig(PeftConfig):
    """The fields that every method of this package has, named as in peft."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: names, their endings, or a regular expression; default: those of the method."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: names, their endings, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt; default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, for target_modules given by hand."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained whole and saved with the adapter, such as a new head."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: random where the method starts from zero, to test what it computes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise BadInput("layers_to_transform has no effect on a regular expression; give target_modules as a list.")

    @override
    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As peft's; the card in that folder then says which import makes the method known."""
        super().save_pretrained(save_directory, **kwargs)
        name_import_in_card(save_directory, self.peft_type.value)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps one module of the base and holds the parameters that each adapter has there.

    Attributes:
        options: By adapter, what the layer needs to know of its config.
        nesting: Layers around one module are nested in this order, the lowest innermost; peft's own count as 1.
    """

    nesting: ClassVar[int]
    other_param_names = ("options",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.options: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._kept: dict[str, torch.Tensor | None] = {}
        self._names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # models read a block's window size, a convolution's stride ...

    def add(self, name: str, config: Any, tuner: "AdapterTuner", key: str) -> None:
        """Make the parameters of the adapter `name`; `key` is the module's name in the base."""
        raise NotImplementedError

    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module gives under these adapters."""
        raise NotImplementedError

    def merged_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """New values of the wrapped module's parameters, by name, with these adapters merged into them."""
        raise NotImplementedError

    def why_not_merged(self, names: Sequence[str]) -> str | None:
        """Why these adapters cannot be merged into the wrapped module; None if they can."""
        raise NotImplementedError

    @override
    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None:
            self._names = adapter_names
        groups = self._groups(adapter_names, next((a for a in (*args, *kwargs.values()) if torch.is_tensor(a)), None))
        return self.forward_adapted(groups, *args, **kwargs) if groups else self.base_layer(*args, **kwargs)

    def _groups(self, adapter_names: Sequence[str] | None, first: torch.Tensor | None) -> Groups:
        if self.disable_adapters or self.merged:
            return []
        if adapter_names is None or first is None:
            acting = [name for name in self.active_adapters if name in self.options]
            return [(acting, None)] if acting else []
        each = len(first) // len(adapter_names)  # SAM's windows, the beams of a search: several rows an example
        if each * len(adapter_names) != len(first):
            raise BadInput(f"{len(adapter_names)} adapter names for {len(first)} rows; give one for each row.")
        rows = [name for name in adapter_names for _ in range(each)]
        groups: Groups = []
        for name in dict.fromkeys(rows):
            index = torch.tensor([i for i, other in enumerate(rows) if other == name], device=first.device)
            groups.append(([name] if name in self.options else [], index))
        return groups if any(names for names, _ in groups) else []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the wrapped module's weights; the old weights are kept for `unmerge`.

        The new weights are always checked for NaN and Inf, as with peft's `safe_merge`.

        Raises:
            InlayError: The method does not fold into a weight.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.options]
        if not names:
            return
        if reason := self.why_not_merged(names):
            raise Unsupported(reason)
        base, names = self.get_base_layer(), [*self.merged_adapters, *names]
        self.unmerge()  # all of them anew: one after the other would not give their sum
        new = self.merged_values(names)
        for key, value in new.items():
            if not torch.isfinite(value).all():
                raise ComputationFailed(
                    f"merging {', '.join(names)} gives NaN or Inf in a {key}; nothing was merged there."
                )
        for key, value in new.items():
            old = base._parameters[key]
            self._kept.setdefault(key, None if old is None else old.data)
            if old is None:
                setattr(base, key, nn.Parameter(value, requires_grad=False))
            else:
                old.data = value.to(old.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the kept weights back, bit for bit."""
        base = self.get_base_layer()
        for key, value in self._kept.items():
            if value is None:
                setattr(base, key, None)
            else:
                base._parameters[key].data = value
        self._kept.clear()
        self.merged_adapters.clear()

    def by_rows(self, groups: Groups, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `call(names, ...)` on the rows of each group, and put the tensors of the results together again.

        The layers inside have the same list of names, which says meanwhile what the rows of that group are.
        """
        if groups[0][1] is None:
            return call(groups[0][0], *args, **kwargs)
        index = [rows for _, rows in groups if rows is not None]
        order = torch.argsort(torch.cat(index))
        all_names = list(self._names)
        each = len(order) // len(all_names)

        def of(value: Any, rows: torch.Tensor) -> Any:
            return value[rows] if torch.is_tensor(value) and value.ndim and len(value) == len(order) else value

        results = []
        try:
            for (names, _), rows in zip(groups, index, strict=True):
                self._names[:] = [all_names[i // each] for i in rows.tolist()]
                results.append(call(names, *(of(a, rows) for a in args), **{k: of(v, rows) for k, v in kwargs.items()}))
        finally:
            self._names[:] = all_names
        parts = zip(*results, strict=True) if isinstance(results[0], tuple) else [results]
        joined = tuple(torch.cat(list(p))[order] if torch.is_tensor(p[0]) else p[0] for p in map(list, parts))
        return joined if isinstance(results[0], tuple) else joined[0]

    def undo_changes(self) -> None:
        """Undo what the layer changed in the wrapped module, when it is taken out for good."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Of the first floating-point parameter, as whole blocks have no weight of their own."""
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        first = next(base_layer.parameters(), None)
        return (None, None) if first is None else (first.device, None)


class WeightLayer(AdapterLayer):
    """A layer whose module computes with new values of its parameters: just those that merging stores."""

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        inside, path = self.base_layer, ""  # another layer of this kind may stand in between, and adds to these values
        while isinstance(inside, BaseTunerLayer):
            inside, path = inside.base_layer, f"{path}base_layer."

        def call(names: list[str], *args: Any, **kwargs: Any) -> Any:
            values = {f"{path}{key}": value for key, value in self.merged_values(names).items()}
            return functional_call(self.base_layer, values, args, kwargs)

        return self.by_rows(groups, call, *args, **kwargs)

    @override
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with torch.no_grad():
            super().merge(safe_merge, adapter_names)

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return None


class AdapterTuner(BaseTuner):
    """Puts layers of `tuner_layer_cls` around the target modules of a model."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _layers: dict[str, list[BaseTunerLayer]]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # add_adapter and load_adapter of transformers come by peft's inject_adapter_in_model, with a bare config.
        self._by_transformers = isinstance(peft_config, PeftConfig)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def refuse_transformers(self, what: str) -> None:
        """Layers inside wrapped modules: transformers, which maps keys by itself, would leave them out of a file."""
        if self._by_transformers:
            raise Unsupported(
                f"add_adapter and load_adapter of transformers cannot save and load {what}; use peft's get_peft_model "
                "and PeftModel.from_pretrained, or inlay's load_adapter."
            )

    def targets(self, config: Any, found: Sites) -> Sequence[str]:
        """Names of the modules to adapt where the config names none."""
        raise NotImplementedError

    def layer_class(self, target: nn.Module) -> type[AdapterLayer]:
        """The class that wraps `target`; an error where the method does not fit it."""
        return self.tuner_layer_cls

    @override
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        freeze_statistics(model)
        with others_train_as_before(model), layers_taken_out(model) as self._layers:
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            found = sites(self.model)
            names = list(self.targets(peft_config, found))
            if peft_config.layers_to_transform is not None:
                within = chosen_blocks(peft_config, found)
                names = [name for name in names if f"{name}.".startswith(within)]
                peft_config.layers_to_transform = None  # said by the names from here on
            if not names:
                raise BadInput(
                    f"found no module for {type(peft_config).__name__} in {type(self.model).__name__} "
                    f"(model_type {model_config.get('model_type')}); give target_modules."
                )
            peft_config.target_modules = name_only(names, self.model)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, BaseTunerLayer):  # wrapped a moment ago: the name leads to the wrapper
            self.refuse_transformers(f"an adapter around {target_name} inside another module that it wraps")
            parent = parent.get_base_layer()
            target = getattr(parent, target_name)
        layer_class = self.layer_class(target)
        earlier = self._layers.get(current_key, [])
        layer = next((layer for layer in earlier if type(layer) is layer_class), None)
        if layer is None:
            layer = layer_class(target)
        else:
            earlier.remove(layer)
        layer.add(adapter_name, peft_config, self, current_key)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft's would give the weight of the child to the new module; blocks and heads of several layers have none."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.check_merge(adapter_names)
            self.merge_adapter(adapter_names, safe_merge)
        for layers in take_layers_out(self.model).values():
            for layer in layers:
                undo_layer_changes(layer)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's, from the inside out, and not begun where a layer cannot merge.

        What is merged already is taken out first, from the outside in, and merged again with the rest: where layers are
        around one another, the outer one keeps a weight that must hold all that the inner one merges.
        """
        if isinstance(adapter_names, str):
            raise BadInput(f"adapter_names must be a list of names, got {adapter_names!r}; give [{adapter_names!r}].")
        self.check_merge(adapter_names)
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]  # outer ones first
        wanted = [[*dict.fromkeys([*m.merged_adapters, *(adapter_names or m.active_adapters)])] for m in layers]
        if all(set(names) <= set(m.merged_adapters) for m, names in zip(layers, wanted, strict=True)):
            return
        self._unmerge(layers)
        try:
            for layer, names in zip(reversed(layers), reversed(wanted), strict=True):
                layer.merge(safe_merge=safe_merge, adapter_names=names)
        except Exception:
            self._unmerge(layers)
            raise

    def _unmerge(self, layers: Sequence[BaseTunerLayer]) -> None:
        for layer in layers:
            if layer.merged:
                layer.unmerge()

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise InlayError if a layer cannot merge these adapters (default: the active ones)."""
        for layer in self.model.modules():
            if isinstance(layer, AdapterLayer):
                names = [n for n in (adapter_names or layer.active_adapters) if n in layer.options]
                if names and (reason := layer.why_not_merged(names)):
                    raise Unsupported(reason)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Rows of one batch under different adapters: peft's argument `adapter_names`, for as long as a forward."""
        names = kwargs.get("adapter_names")
        handles = []
        if names is not None:
            if self.training:
                raise BadInput("adapter_names choose an adapter per row in eval mode only; call model.eval().")
            unknown = sorted(set(names) - {"__base__", *self.peft_config})
            if unknown:
                known = ", ".join(self.peft_config)
                raise BadInput(f"unknown adapter {', '.join(unknown)} in adapter_names; choose among {known}.")
            if (beams := kwargs.get("num_beams") or 1) > 1:
                names = [name for name in names for _ in range(beams)]
            for module in self.modules():
                if isinstance(module, AdapterLayer | LoraLayer | AuxiliaryTrainingWrapper):
                    handles.append(module.register_forward_pre_hook(partial(_name_rows, names=names), with_kwargs=True))
                elif isinstance(module, BaseTunerLayer):
                    raise Unsupported(f"{type(module).__name__} of peft cannot mix adapters in one batch.")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A file's keys are the same whatever else is wrapped around the module."""
        parts = key.split(".")
        for i, part in enumerate(parts[:-1]):  # parts of many layers: peft looks for the name only near the end
            if part.startswith("inlay_") and parts[i + 1] == adapter_name:
                return name_in_base(".".join(parts[: i + 1] + parts[i + 2 :]))
        return name_in_base(super()._remove_adapter_name_from_key(key, adapter_name))


@contextmanager
def others_train_as_before(model: nn.Module) -> Iterator[None]:
    """Within the block an adapter is added, which changes nothing in whether the parameters of others train.

    peft's tuners do not find the layers that are there already, so they cannot see to that by themselves here. They
    also go by names, and take what is in a module called `mlp` for a part of the adapter `mlp`.
    """
    earlier = []
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # else the base is frozen now
        earlier = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, requires_grad in earlier:
        parameter.requires_grad = requires_grad


def name_only(names: list[str], model: nn.Module) -> list[str] | str:
    """What target_modules has to say for these modules: a pattern of whole names where one is the ending of another's.

    peft takes a name in a list for all modules that end so: the last `norm` of a PoolFormer for those in its blocks.
    """
    wanted = set(names)
    for name, _ in model.named_modules():
        parts = name.split(".")
        endings = {".".join(parts[i:]) for i in range(1, len(parts))}
        if name not in wanted and wanted & endings:
            return "|".join(re.escape(each) for each in names)
    return names


def _name_rows(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": names}


def chosen_blocks(config: Any, found: Sites) -> tuple[str, ...]:
    """Beginnings of the names of all modules in the blocks that `layers_to_transform` chooses.

    Raises:
        InlayError: A number that no block has.
    """
    numbers = config.layers_to_transform
    numbers = [numbers] if isinstance(numbers, int) else numbers
    wrong = [i for i in numbers if not 0 <= i < len(found.blocks)]
    if wrong:
        raise BadInput(f"layers_to_transform must be within 0 to {len(found.blocks) - 1}, got {wrong}.")
    return tuple(f"{found.blocks[i]}." for i in numbers)
