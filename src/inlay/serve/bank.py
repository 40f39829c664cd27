"""Many adapters on one base, chosen for each row of a batch.

    bank = Bank("builtin:vit-tiny", "adapters/")                    # a folder of adapters
    logits = bank({"pixel_values": pixels}, ["cats", "dogs", None]).logits      # None: the plain base

Adapters are tensors in stacks here, not modules: to load one fills a slot, to choose one is an index, and a batch costs
the same however many adapters its rows have. Methods and widths may differ from adapter to adapter.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from inlay.adapters import golden
from inlay.adapters.checks import Candidate, run_checks
from inlay.adapters.file import AdapterFile, Reading, hash_config
from inlay.adapters.hub.fetch import fetch
from inlay.adapters.identity import Identity
from inlay.adapters.task import find_task_of_file
from inlay.bases.bfloat16 import choose_dtype
from inlay.bases.device import Device, choose_device
from inlay.bases.load import Dtype, find_head
from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.methods._peft import put_layers_back, remove_all_adapters, take_layers_out, undo_layer_changes
from inlay.serve.bank_layer import BankLayer, Rows, Site, Stacks
from inlay.serve.catalogue import Catalogue, load_base_of
from inlay.serve.prompt import TABLE, PromptStacks, is_cached_prefix, shift_positions, split_cached_prefix
from inlay.serve.sites import find_sites

Values = dict[str, torch.Tensor]


class NoRoom(BadInput):
    """More adapters at the same time than the budget of a bank has room for."""


@dataclass(eq=False)
class Held:
    """An adapter as it was when a bank was asked to hold it: rows under it keep its weights until it is released.

    Attributes:
        name: Of the adapter.
        digest: Of its file.
        slot: Where the stacks have it, even if another file or none has its name by now.
        ahead: Tokens in the cache, behind which the positions of a text go on.
    """

    name: str
    digest: str
    slot: int
    ahead: int


Choice: TypeAlias = str | Held | None  # what a row of a batch has: an adapter by name, a held one, or the plain base


class Bank(Catalogue):
    """A base with any number of adapters, of which each row of a batch has one, or none.

    A bank holds LoRA (on linear layers, convolutions and embeddings), (IA)³, SSF, bottlenecks, ConvPass, Conv-Adapter,
    attention prefixes, visual prompts, peft's prompts and prefixes, biases and norms, heads of one linear layer, and
    composites of those at different modules. Calls from several threads wait for each other; those of one thread may be
    nested in `rows`.

    Attributes:
        model: The base, wrapped in place; outside of a call it computes what it did.
        files: What was read of each resident adapter: its config, labels and preprocessing; all have a digest here.
        checks: By resident adapter the result of each of CHECKS: ok; not recorded where the file does not say what it
            should be; left out.
        refused: With `skip_unfit`, why each adapter was left out.
        refused_paths: Where those are.
        counts: Of loads and evictions.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
        *,
        budget_mb: float | None = None,
        check_golden: bool = True,
        skip_unfit: bool = False,
        device: Device | None = None,
        dtype: Dtype | Literal["auto"] = "float32",
    ) -> None:
        """Prepare a base for the adapters in a folder, at a list of paths and Hub ids, or by names of your own.

        Args:
            base: A name for `load_base`, or a model without an adapter. A base given by name that can be loaded for
                several tasks is loaded for that of the first adapter; if it was saved without a head for that task, it
                gets one of that adapter's size, which no row uses: each must name an adapter.
            adapters: A folder of adapters, paths (the last part is the name), or paths by name.
            budget_mb: Most that the stacks may take; adapters are then read when a batch first asks for them, and the
                least recently used ones give way. Without it all are read now.
            check_golden: Compute the golden output of each adapter when it is read first, a forward of one row: most of
                the time that reading takes. False leaves this one check out, for many adapters that have been checked
                before (`inlay info --verify`).
            skip_unfit: Leave out adapters that do not fit, which `refused` then names, instead of raising an error.
            device: Such as "cpu" or "cuda:1"; default: the best that this machine has. A base that is given stays
                where it is.
            dtype: Of a base that is given by name. "auto": bfloat16 where the device is faster in it and all adapters
                that are read now meet their golden output in it, else float32. The stacks are float32 always.

        Raises:
            InlayError: A folder without adapters, two of one name, or what `add` says.
        """
        if isinstance(base, nn.Module) and (device is not None or dtype != "float32"):
            raise BadInput("the base is a model already: move it with base.to(...) and leave device and dtype out.")
        super().__init__(adapters, budget_mb=budget_mb, check_golden=check_golden, skip_unfit=skip_unfit)
        if isinstance(base, nn.Module):
            self._start(base, lacks_head=False)
            return
        where = choose_device(device)
        chosen: Dtype = choose_dtype(where)[0] if dtype == "auto" else dtype
        try:
            self._load_and_start(base, where, chosen)
        except DamagedFile:
            if dtype != "auto" or chosen == "float32":
                raise
            self._load_and_start(base, where, "float32")

    def _load_and_start(self, base: str | Path, device: torch.device, dtype: Dtype) -> None:
        loaded = load_base_of(base, self._paths, device, dtype)
        self._start(loaded, lacks_head=bool(loaded.new_head))

    def _start(self, base: PreTrainedModel, *, lacks_head: bool) -> None:
        """Take this base, and read the adapters unless there is a budget."""
        self._lacks_head = lacks_head
        self._take_base(base)
        self._module_names = [name for name, _ in self.model.named_modules()]
        self._outputs: dict[str, list[float]] = {}  # golden ones, by the digest of the adapter's file
        self._rows = Rows(next(p for p in self.model.parameters() if p.is_floating_point()).device)
        self._prompts = PromptStacks(self._rows)
        self._shift = shift_positions(self.model, self._rows)
        self._layers: dict[tuple[str, type[BankLayer]], BankLayer] = {}
        self._ahead: dict[str, int] = {}  # tokens in the cache, behind which positions go on
        self._slots: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._known_sites: dict[Any, list[Site]] = {}
        self._holds: set[Held] = set()
        self._open_blocks: list[list[Choice]] = []  # rows of each block of `rows` that is open, the innermost last
        if self.budget is None:
            self._rows.capacity = len(self._paths) + 1
            self._load_all()

    @property
    def resident(self) -> list[str]:
        """Those that are in memory, the least recently used first."""
        return list(self._slots)

    @property
    def bytes(self) -> int:
        """Size of the stacks."""
        return sum(stack.nbytes for stacks in self._stacks() for stack in stacks.buffers())

    @property
    def prompts(self) -> PromptStacks:
        """peft's prompts, which stand in front of the texts of their rows."""
        return self._prompts

    @property
    def room(self) -> int | None:
        """Adapters that may be in one batch, by the budget and the size of those in memory; None without a budget."""
        if self.budget is None:
            return None
        each = self.bytes // self._rows.capacity
        return max(1, self.budget // max(each, 1) - 1)

    def hold(self, name: str) -> Held:
        """An adapter for rows of several calls, such as those of a text that is written token by token.

        Whatever is added, evicted or removed meanwhile, rows under it have the weights of this moment; those that ask
        for its name have what the name stands for. It takes its memory until it is released.

        Raises:
            InlayError: As `rows`.
        """
        with self._lock:
            self._make_resident([name])
            held = Held(name, self.files[name].digest, self._slots[name], self._ahead.get(name, 0))
            self._holds.add(held)
        return held

    def release(self, held: Held) -> None:
        """End a hold: its slot is free for others if no name and no other hold needs it."""
        with self._lock:
            self._holds.discard(held)

    def unload(self) -> PreTrainedModel:
        """The base as it was, without the bank.

        Raises:
            InlayError: A block of `rows` is open, or an adapter is held.
        """
        with self._lock:
            if self._holds:
                raise BadInput(f"{len(self._holds)} adapters of this bank are held; release them before you unload it.")
            if self._open_blocks:
                raise BadInput("a block of rows() is open on this bank; leave it before you unload the bank.")
            remove_all_adapters(self.model)
            self._shift.remove()
            self._layers.clear()
            self._slots.clear()
            self.files.clear()
            self.checks.clear()
        return self.model

    @contextmanager
    def rows(self, adapters: Sequence[Choice]) -> Iterator[PreTrainedModel]:
        """The model, whose batch inside the block has these adapters, one per row; None is the plain base.

        Those that are not in memory are read first. peft's prompts act only in `bank(...)` and `generate`. Inside the
        block other calls of the bank have their own rows, and adapters may come and go, but for those of these rows.

        Raises:
            InlayError: A name that the bank does not know; more different adapters than the budget has room for; None
                where the base has no head of its own.
        """
        if self._lacks_head and None in adapters:
            raise BadInput(
                f"{self.model.name_or_path} has no head of its own for this task, so the plain base answers nothing; "
                "name an adapter for each row."
            )
        with self._lock:
            self._make_resident([name for name in dict.fromkeys(adapters) if isinstance(name, str)])
            block = list(adapters)
            self._open_blocks.append(block)
            try:
                self._choose_rows()
                yield self.model
            finally:
                self._open_blocks = [other for other in self._open_blocks if other is not block]
                self._choose_rows()

    def _choose_rows(self) -> None:
        """Give the batch the rows of the innermost open block, or the plain base."""
        slots, ahead = [], []
        for choice in self._open_blocks[-1] if self._open_blocks else []:
            if isinstance(choice, Held):
                slots.append(choice.slot)
                ahead.append(choice.ahead)
            else:
                slots.append(0 if choice is None else self._slots[choice])
                ahead.append(self._ahead.get(choice or "", 0))
        self._rows.choose(slots, ahead)

    def _make_resident(self, wanted: Sequence[str]) -> None:
        """Read those of these adapters that are not in memory."""
        for name in wanted:
            self.find_path(name)
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
                self.counts.hits += 1
        for name in wanted:
            if name not in self._slots:
                self._load(name, keep=set(wanted))

    @override
    def _drop(self, name: str) -> None:
        del self._slots[name]

    @override
    def _check_free(self, name: str) -> None:
        if any(name in block for block in self._open_blocks):
            raise BadInput(f"adapter {name!r} has rows in an open block of rows(); leave that block first.")

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], adapters: Sequence[Choice], **more: Any) -> Any:
        """The model's output for a batch whose rows have these adapters; None is the plain base.

        Rows with fewer labels than others have -inf for the rest. Logits are those of the text's own tokens, also
        behind peft's prompts.

        Args:
            inputs: Tensors that the model takes.
            adapters: One name per row.
            **more: Further arguments of the model.

        Raises:
            InlayError: As `rows`, or another number of rows than of names.
        """
        with self.rows(self._check_rows(inputs, adapters)) as model:
            prompted, length = self._prompts.prepend_prompts(model, inputs)
            output = model(**prompted, **more)
            if length:
                output.logits = output.logits[:, length:]
            return output

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Any], adapters: Sequence[Choice], **settings: Any) -> torch.Tensor:
        """Continue texts, padded on the left, under these adapters; gives tokens, the texts' own included.

        Args:
            inputs: input_ids (B, N) and attention_mask.
            adapters: One name per row; None is the plain base.
            **settings: Of transformers' `generate`.
        """
        with self.rows(self._check_rows(inputs, adapters)) as model:
            prompted, length = self._prompts.prepend_prompts(model, inputs)
            if not length:
                return model.generate(**inputs, **settings)
            prompted.pop("position_ids", None)  # transformers counts them from the mask
            ids = inputs["input_ids"]
            new = model.generate(**prompted, **settings)
            return torch.cat([ids.repeat_interleave(len(new) // len(ids), dim=0), new], dim=1)

    def as_model(self, name: str) -> nn.Module:
        """A model that takes batches of one row, under this adapter."""
        return _OneRow(self, name)

    def _check_rows(self, inputs: Mapping[str, Any], adapters: Sequence[Choice]) -> Sequence[Choice]:
        rows = next((len(value) for value in inputs.values() if torch.is_tensor(value)), 0)
        if isinstance(adapters, str) or rows != len(adapters):
            given = repr(adapters) if isinstance(adapters, str) else f"{len(adapters)} adapters"
            raise BadInput(f"{given} for {rows} rows; give a list with one adapter, or None, for each row.")
        return adapters

    def _stacks(self) -> list[Stacks]:
        return [self._prompts, *(layer.stacks for layer in self._layers.values())]

    def _load(self, name: str, keep: set[str] | None = None) -> None:
        """Check an adapter, which fills a slot on the way; the bank is as it was if it does not fit."""
        newcomer = _Newcomer(self, name, keep or set())
        candidate = Candidate(Reading(fetch(self.find_path(name))), newcomer)
        try:
            run_checks(candidate)
        except Exception:
            newcomer.withdraw()
            raise
        self.checks[name] = candidate.results
        self.counts.loads += 1
        self.counts.bytes = self.bytes

    def _fill_slot(self, slot: int, values: Mapping[Stacks, Values]) -> None:
        """Put the tensors of an adapter into a slot of all stacks."""
        for layer in self._layers.values():
            found = values.get(layer.stacks, layer.values_if_absent())
            layer.stacks.fill_slot(slot, found)
            layer.stacks.sizes[slot] = layer.size_of(found)
        self._prompts.fill_slot(slot, values.get(self._prompts, {}))
        self._prompts.sizes[slot] = len(values.get(self._prompts, {}).get("prompt", ()))

    def _find_sites(self, file: AdapterFile, weights: Values) -> list[Site]:
        """Where the adapter goes; one of a config and shapes that are known needs no injection to tell."""
        shapes = tuple(sorted((key, tuple(value.shape)) for key, value in weights.items()))
        key = (hash_config(file.config), len(file.labels), shapes)
        if key not in self._known_sites:
            self._known_sites[key] = find_sites(self.model, file, weights)
        return self._known_sites[key]

    def _resolve_settings(self, site: Site) -> Any:
        """Those of a site; names of modules as modules."""
        if not isinstance(site.settings, tuple):
            return site.settings
        return tuple(self.model.get_submodule(each) if isinstance(each, str) else each for each in site.settings)

    def _wrap_modules(self, sites: Sequence[Site]) -> None:
        """Put layers around modules that have none yet."""
        fresh = [site for site in sites if (site.module, site.kind) not in self._layers]
        if not fresh:
            return
        layers = take_layers_out(self.model)
        try:
            for site in fresh:
                layer = site.kind(self.model.get_submodule(site.module), self._rows).eval()
                self._layers[site.module, site.kind] = layer
                layers.setdefault(site.module, []).append(layer)
        finally:
            put_layers_back(self.model, layers)

    def _unwrap_modules(self, kept: set[tuple[str, type[BankLayer]]]) -> None:
        """Take the layers away that are not among those to be kept."""
        if kept == self._layers.keys():
            return
        layers = take_layers_out(self.model)
        try:
            for key in self._layers.keys() - kept:
                layer = self._layers.pop(key)
                layers[key[0]].remove(layer)
                undo_layer_changes(layer)
        finally:
            put_layers_back(self.model, layers)

    def _claim_slot(self, name: str, values: Mapping[Stacks, Values], keep: set[str]) -> int:
        """A slot for an adapter: its own, or a free one, for which others may have to give way."""
        others = [other for other in self._slots if other != name]
        held = {each.slot for each in self._holds}
        if self.budget is not None:
            shapes = [stacks.shapes(values.get(stacks, {})).values() for stacks in self._stacks()]
            each = 4 * sum(math.prod(shape) for of_one in shapes for shape in of_one)
            room = self.budget // max(each, 1) - 1  # one slot is the plain base's
            in_use = {other for block in self._open_blocks for other in block}
            in_use |= {other for other in others if self._slots[other] in held}
            spare = [other for other in others if other not in keep and other not in in_use]
            replaced = held - {self._slots[other] for other in others}  # slots of what no other name stands for
            if len(others) - len(spare) + len(replaced) + 1 > room:
                raise NoRoom(
                    f"budget_mb {self.budget / 1e6:g} has room for {max(room, 0)} adapters of this size "
                    f"({each / 1e6:.2g} MB each), and this batch asks for more; raise it, or split the batch."
                )
            for other in spare[: max(0, len(others) + len(replaced) + 1 - room)]:
                self.evict(other)
                self.counts.evictions += 1
            if self._rows.capacity > room + 1:
                self._repack(room + 1)
            held = {each.slot for each in self._holds}  # they may have moved
        if name in self._slots and self._slots[name] not in held:
            return self._slots[name]
        used = {*self._slots.values(), *held, 0}
        free = next((slot for slot in range(self._rows.capacity) if slot not in used), None)
        if free is None:
            free = self._rows.capacity
            limit = 2 * self._rows.capacity if self.budget is None else min(2 * self._rows.capacity, room + 1)
            self._repack(max(limit, free + 1))
        return free

    def _repack(self, capacity: int) -> None:
        """Stacks of so many slots, the used ones in front."""
        order = list(dict.fromkeys([0, *self._slots.values(), *(held.slot for held in self._holds)]))
        self._rows.capacity = capacity
        for stacks in self._stacks():
            stacks.repack(order)
        moved = {old: new for new, old in enumerate(order)}
        for name, slot in self._slots.items():
            self._slots[name] = moved[slot]
        for held in self._holds:
            held.slot = moved[held.slot]
        self._choose_rows()  # those of an open block have moved


class _Newcomer:
    """An adapter on its way into a bank: what CHECKS ask of the place where it is to be used."""

    shared = True

    def __init__(self, bank: Bank, name: str, keep: set[str]) -> None:
        self.computes = bank.check_golden
        self._bank, self._name, self._keep = bank, name, keep
        self._layers = set(bank._layers)
        self._before: Callable[[], None] | None = None

    def load_base(self, file: AdapterFile) -> str:
        """The bank's."""
        return str(self._bank.model.name_or_path)

    def identify_base(self) -> Identity:
        """As it was when the bank was made."""
        return self._bank._identity

    def module_names(self) -> list[str]:
        """Without the layers of the bank."""
        return self._bank._module_names

    def inject(self, file: AdapterFile, weights: Values) -> None:
        """Fill a slot, which is the adapter's own from here on."""
        bank = self._bank
        lacking = [head for head in find_head(bank.model) if not any(f".{head}." in key for key in weights)]
        if bank._lacks_head and lacking:
            raise Unsupported(
                f"adapter {file.name!r} brings no head {lacking[0]!r}, and neither does the base of this bank; give it "
                "a bank of its own."
            )
        sites = bank._find_sites(file, weights)
        cache = is_cached_prefix(file.config)
        if cache:
            weights = split_cached_prefix([site.module for site in sites], weights[TABLE])
        bank._wrap_modules(sites)
        values: dict[Stacks, Values] = {}
        for site in sites:
            layer = bank._layers[site.module, site.kind]
            settings = bank._resolve_settings(site)
            layer.check_settings(settings)
            values[layer.stacks] = layer.make_stack_values(
                {leaf: weights[key] for leaf, key in site.keys.items()}, settings
            )
        if TABLE in weights:
            values[bank._prompts] = {"prompt": weights[TABLE].float()}
        slot = bank._claim_slot(self._name, values, self._keep)
        self._remember_adapter()
        bank._fill_slot(slot, values)
        bank._slots[self._name] = slot
        bank._slots.move_to_end(self._name)
        bank._ahead[self._name] = file.config["num_virtual_tokens"] if cache else 0
        bank.files[self._name] = bank._with_digest(file)

    def load_processor(self, file: AdapterFile) -> Any:
        """The bank's; None for plain peft's, where the base brings none."""
        try:
            return self._bank.load_processor(file)
        except InlayError:
            if file.record:
                raise
            return None

    def golden_output(self, file: AdapterFile, processor: Any) -> list[float]:
        """Of one row of the bank; the same bytes on the same base give what they gave."""
        bank, outputs = self._bank, self._bank._outputs
        if file.digest not in outputs:
            task = find_task_of_file(file, bank.model.config)
            found = golden.compute_output(bank.as_model(self._name), processor, task)
            if not file.digest:
                return found
            outputs[file.digest] = found
        return outputs[file.digest]

    def withdraw(self) -> None:
        """Leave the bank as it was, but for adapters that gave way: those are read again when they are asked for."""
        if self._before is not None:
            self._before()
        self._bank._unwrap_modules(self._layers)

    def _remember_adapter(self) -> None:
        """What has the name now, for `withdraw`."""
        bank, name = self._bank, self._name
        file, results, ahead = bank.files.get(name), bank.checks.get(name), bank._ahead.get(name, 0)
        slot = bank._slots.get(name)
        held = {}
        if slot is not None:
            for stacks in bank._stacks():
                values = {key: stack[slot].clone() for key, stack in stacks._buffers.items() if stack is not None}
                held[stacks] = values, stacks.sizes.get(slot, 0)

        def give_back() -> None:
            if slot is None or file is None or results is None:
                for table in (bank._slots, bank._ahead, bank.files):
                    table.pop(name, None)
                return
            for stacks, (values, size) in held.items():
                stacks.fill_slot(slot, values)
                stacks.sizes[slot] = size
            bank.files[name], bank.checks[name], bank._ahead[name] = file, results, ahead
            bank._slots[name] = slot  # the newcomer has another one where this one is held

        self._before = give_back


class _OneRow(nn.Module):
    """A bank whose batch has one row under one adapter, as the model that is asked for its golden output."""

    def __init__(self, bank: Bank, name: str) -> None:
        super().__init__()
        self.model = bank.model
        self.config = bank.model.config
        self._ask = lambda inputs: bank(inputs, [name])

    def forward(self, **inputs: Any) -> Any:
        """The bank's output."""
        return self._ask(inputs)
