"""Combine adapters: one adapter of several, from their files only, with the error that it makes.

`inlay.combine` is this package and, called, its function.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inlay.adapters.file import CONFIG
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, PREFIX, WEIGHTS, fits_pipeline
from inlay.combine.heads import WAYS, Heads, join_heads
from inlay.combine.method_sum import Sum, SumOptions
from inlay.combine.norms import total_error
from inlay.combine.parts import Array, Source
from inlay.combine.read import check_digests, open_adapters
from inlay.combine.rules import RULES, Settings, find_rule, weights_under_rule
from inlay.combine.sums import SUM_BY_PEFT_TYPE
from inlay.combine.weights import Weight
from inlay.combine.write import Stream, list_versions, make_metadata, make_record, read_back, write_settings
from inlay.errors import BadInput, ComputationFailed, DamagedFile, InlayError, Unsupported
from inlay.files.atomic import writing
from inlay.files.outputs import check_replaceable_folder

if TYPE_CHECKING:
    from inlay.combine.fit import Fitted

__all__ = ["RULES", "Combined", "combine"]


@dataclass(frozen=True)
class Combined:
    """What a combination is.

    Attributes:
        folder: Where it was written.
        rule: Its row in RULES.
        weights: By adapter, as the rule took them; by part of the base where they were given so.
        widths: Rank, units or length of each method; none for differences of weights.
        heads: What became of the heads.
        labels: Class names in the order of the logits.
        groups: Names of the groups of labels that `predict` can be asked for.
        error: Relative error of the update in total, against what the rule gives without a limit of width; 0: exact.
        errors: The same by module.
        fitted: How the weights were fitted, where they were.
    """

    folder: Path
    rule: str
    weights: dict[str, Weight]
    widths: dict[str, int]
    heads: str
    labels: list[str]
    groups: list[str]
    error: float
    errors: dict[str, float] = field(default_factory=dict)
    fitted: "Fitted | None" = None


def combine(
    adapters: Mapping[Any, float | Mapping[str, float]],
    rule: str = "add",
    *,
    out: str | Path,
    width: int | Literal["auto"] | None = None,
    error: float = 0.01,
    density: float = 0.5,
    seed: int = 0,
    heads: str = "auto",
    activations: Mapping[str, Array] | None = None,
    report: str | Path | None = None,
    fit: str | Path | None = None,
    examples: int = 32,
    dense: bool = False,
    base: str | Path | None = None,
) -> Combined:
    """Make one adapter of several, from their files only: no base is loaded, and one module at a time is in memory.

    `add` and `average` are exact: the result computes what the adapters compute together (see DESIGN, the algebra). A
    folder that plain peft saved is as good as ours; the result is one that peft loads. Nothing is written unless it
    passes its check against the adapters.

    Args:
        adapters: Folders (or Hub ids) and weights, any real numbers. A weight may also be one for each part that the
            adapter changes: `{"unet": 1.0, "text_encoder": 0.5}`, by the names of the modules at the top of the base.
        rule: A name in RULES.
        out: Folder of the result.
        width: Largest rank, or size of a bottleneck, of the result; auto: the smallest that `error` allows.
        error: For "auto", ‖ΔW - ΔW'‖ / ‖ΔW‖ of all modules together; of bottlenecks with a non-linearity the same of
            what they add to `activations`, or else an estimate that takes their units for independent.
        density: Share of the entries that ties, dare, magnitude and knots keep.
        seed: Of dare.
        heads: What classifier heads become: auto (disjoint labels are stacked, equal ones averaged by the weights),
            stack, average, or the name of the adapter whose head, labels and preprocessing are kept.
        activations: Hidden states (N, d) that reach the bottleneck of a module, by the module's name: a smaller width
            is then fitted to them.
        report: A .png, .json or .txt file, written first: where the adapters meet, and how they agree there.
        fit: Labelled data, as a recipe's `dataset`, on which the weights are fitted, starting from those given; this
            loads the base.
        examples: How many of them to use.
        dense: Load the base, and give the sum as a difference of its weights: for what does not add, such as DoRA.
        base: Which one, for `dense`; default: the one that the adapters name.

    Raises:
        InlayError: Adapters of other bases, or that do not add, with the reason; weights or a width that make no sense.

    Source: the rules have theirs in RULES; the exact sums are those of He et al. 2021, arXiv:2110.04366, table 1.
    """
    settings = Settings(density, seed)
    row = find_rule(rule, settings)
    _check_width(width, error)
    with open_adapters(adapters) as sources:
        folder = _check_folder(out, sources)
        weights = weights_under_rule(row, [source.weight for source in sources])
        sources = [source.with_weight(weight) for source, weight in zip(sources, weights, strict=True)]
        head = join_heads(sources, heads, exact=row.linear and (fit is None or row.normal))
        keep = heads if heads not in WAYS else None
        options = SumOptions(row, settings, width, error, keep, dict(activations or {}))
        fitted = _fit_weights(sources, head, options, str(fit), examples, seed) if fit is not None else None
        if fitted is not None:
            sources = [source.with_weight(fitted.weights[source.name]) for source in sources]
            head = head.with_weights(fitted.weights)
        if report is not None:
            from inlay.combine.heatmap import write_report
            from inlay.combine.report import compare_sources

            check_digests(sources)
            write_report(compare_sources(sources), report)
        if dense:
            return _combine_dense(sources, head, options, rule, None if base is None else str(base), folder)
        made = _write_combination(sources, make_sums(sources, options), head, rule, keep, folder)
        return made if fitted is None else replace(made, fitted=fitted)


def _check_width(width: Any, error: float) -> None:
    whole = isinstance(width, int) and not isinstance(width, bool) and width >= 1
    if not (width is None or width == "auto" or whole) or not 0 <= error < 1:
        raise BadInput(
            f"width must be a whole number of at least 1 or 'auto', and error from 0 to below 1; they are {width!r} "
            f"and {error}."
        )


def _check_folder(out: str | Path, sources: Sequence[Source]) -> Path:
    folder = check_replaceable_folder(out, CONFIG, "an adapter")
    if folder.resolve() in {source.file.folder.resolve() for source in sources}:
        raise BadInput(f"{folder} is one of the adapters that are combined; give another folder.")
    return folder


def _fit_weights(
    sources: list[Source], heads: Heads, options: SumOptions, data: str, examples: int, seed: int
) -> "Fitted":
    """Through the model, so with all of torch; only here."""
    from inlay.combine.fit import fit_weights

    def write(at: list[Source], made: Mapping[str, Sum], folder: Path) -> Combined:
        return _write_combination(at, made, heads, "add", options.keep, folder)

    return fit_weights(sources, make_sums, write, heads, options, data, examples=examples, seed=seed)


def _combine_dense(
    sources: Sequence[Source], heads: Heads, options: SumOptions, rule: str, base: str | None, folder: Path
) -> Combined:
    from inlay.combine.dense import write_dense

    if options.width is not None:
        raise Unsupported("a difference of weights has no width; leave width or dense out.")
    check_digests(sources)
    metrics = {
        "combined": {**_describe_combination(sources, heads, rule), "error": 0.0},
        "dataset": _name_datasets(sources),
    }
    write_dense(sources, heads, options, base, folder, metrics)
    weights = {source.name: source.weight for source in sources}
    return Combined(folder, rule, weights, {}, heads.summary, heads.labels, list(heads.groups), 0.0)


def _describe_combination(sources: Sequence[Source], heads: Heads, rule: str) -> dict[str, Any]:
    """What goes into the record, the metrics and the card of a combination."""
    of = [{"name": source.name, "weight": source.weight} for source in sources]
    return {"rule": rule, "paper": RULES[rule].paper, "of": of, "heads": heads.summary}


def _name_datasets(sources: Sequence[Source]) -> str:
    return " + ".join(dict.fromkeys(str(source.file.metrics.get("dataset") or source.name) for source in sources))


def make_sums(sources: Sequence[Source], options: SumOptions) -> dict[str, Sum]:
    """The sum of each method that one of the adapters has; several methods become a composite.

    Raises:
        InlayError: A method that does not add.
    """
    kinds = dict.fromkeys(kind for source in sources for kind in source.methods)
    for source in sources:
        if changed := source.file.record.get("changed_weights"):
            raise Unsupported(
                f"adapter {source.name!r} was trained next to modules that make another weight of their own "
                f"({changed[0]}), so that its tensors are no update and do not add; train lora-conv instead."
            )
        for kind in source.methods:
            if kind not in SUM_BY_PEFT_TYPE:
                raise Unsupported(
                    f"adapter {source.name!r} is of the method {kind}, which is no sum over a width, so that two of "
                    "them do not add; use dense=True, which takes the base and gives the sum as a partial delta."
                )
    if len(kinds) > 1 and not all(SUM_BY_PEFT_TYPE[kind].wraps_modules for kind in kinds):
        raise Unsupported(
            f"{' and '.join(kinds)} cannot be one adapter: peft's prompts and prefixes wrap no module; train an "
            "attention prefix of inlay instead."
        )
    found: dict[str, Sum] = {}
    for kind in kinds:
        parts = [part for source in sources for part in source.list_parts(kind)]
        try:
            found[kind] = SUM_BY_PEFT_TYPE[kind](parts, options)
        except InlayError:
            raise
        except Exception as error:  # a config is data from anywhere: it makes this fail in any way
            names = ", ".join(dict.fromkeys(part.name for part in parts))
            raise DamagedFile(
                f"the configs of {names} do not fit their tensors ({type(error).__name__}: {error}); download them "
                "again."
            ) from error
    return found


def make_config(sources: Sequence[Source], made: Mapping[str, Sum], heads: Heads) -> dict[str, Any]:
    """adapter_config.json of the result; several methods make a composite."""
    first = sources[0].file.config
    if len(made) == 1:
        config = {**next(iter(made.values())).config}
    else:
        own = {"modules_to_save": None, "base_model_name_or_path": None, "auto_mapping": None, "inference_mode": False}
        config = {
            "peft_type": "INLAY_COMPOSITE",
            "parts": [{**each.config, **own} for each in made.values()],
            "peft_version": first.get("peft_version"),
        }
    for key in ("auto_mapping", "base_model_name_or_path", "revision", "task_type"):
        config[key] = first.get(key)
    config["inference_mode"] = True
    if heads.modules or "modules_to_save" in config or len(made) > 1:
        config["modules_to_save"] = heads.modules or None
    return config


def list_shapes(made: Iterable[Sum], heads: Heads) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the result, in the order in which they are written."""
    shapes = dict(heads.shapes)
    for each in made:
        for site, leaves in each.shapes.items():
            shapes |= {_tensor_key(site, leaf): shape for leaf, shape in leaves.items()}
    return shapes


def _tensor_key(site: str, leaf: str) -> str:
    return f"{PREFIX}{site}.{leaf}" if site else leaf


def _write_combination(
    sources: Sequence[Source], made: Mapping[str, Sum], heads: Heads, rule: str, keep: str | None, folder: Path
) -> Combined:
    """All tensors into a folder that takes its place at the end, read back and compared before that."""
    config, shapes = make_config(sources, made, heads), list_shapes(made.values(), heads)
    said = _describe_combination(sources, heads, rule)
    record = make_record(sources, heads, keep, dict(said))
    of_pipeline = any(source.file.weights.name == PIPELINE_WEIGHTS for source in sources)
    with writing(folder) as new:
        path = new / (PIPELINE_WEIGHTS if of_pipeline and fits_pipeline(config, shapes) else WEIGHTS)
        with closing(Stream(path, shapes, make_metadata(path, shapes, config, record))) as stream:
            _write_tensors(stream, made, heads)
        errors = {site: value for each in made.values() for site, value in each.errors.items()}
        norms = {site: each.norms.get(site, 0.0) for each in made.values() for site in each.errors}
        off = total_error(errors, norms)
        metrics = {"combined": {**said, "error": off}, "dataset": _name_datasets(sources), "versions": list_versions()}
        write_settings(new, config, record, metrics)
        read_back(new, shapes)
        check_digests(sources)
    weights = {source.name: source.weight for source in sources}
    widths = {kind: each.width for kind, each in made.items() if each.width}
    return Combined(folder, rule, weights, widths, heads.summary, heads.labels, list(heads.groups), off, errors)


def _write_tensors(stream: Stream, made: Mapping[str, Sum], heads: Heads) -> None:
    """Each tensor as soon as it is there."""
    for key in heads.shapes:
        stream.write(key, heads.make(key))
    for each in made.values():
        for site, leaves in each.shapes.items():
            try:
                tensors = each.make(site)
            except np.linalg.LinAlgError as error:  # of NaN or Inf in an adapter
                raise ComputationFailed(
                    f"the combination has no singular values at {site} ({error}), as an adapter holds NaN or Inf; "
                    "nothing was written."
                ) from error
            for leaf in leaves:
                stream.write(_tensor_key(site, leaf), tensors.pop(leaf))
    stream.finish()


class _Verb(ModuleType):
    """`inlay.combine` is a package, as its parts have to be somewhere, and what users call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Combined:
        return combine(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
