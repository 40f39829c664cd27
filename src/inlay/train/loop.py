"""The training loop, written on accelerate."""

import math
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from inlay.bases.device import is_asynchronous
from inlay.bases.learning_rate import scale_rate
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.train.acceleration import accelerated
from inlay.train.callback import Callback
from inlay.train.collate import TwoStepCollate, split_collate
from inlay.train.config import TrainConfig
from inlay.train.evaluation import count_rows, evaluate_on, set_train_mode, split_batch
from inlay.train.frozen_cache.frozen_blocks import FitData, use_cached_states, wrap_for_cache
from inlay.train.guards import StopRequest, find_first_bad_number
from inlay.train.launch import (
    build_loaders,
    build_optimizer,
    enable_checkpointing,
    read_step_batch,
    release_model,
    start_accelerator,
)
from inlay.train.losses import Loss, ModelLoss
from inlay.train.run import Progress, Run, open_run
from inlay.train.sampler import SeededDataset, SeededSampler, seed_all, seed_cpu
from inlay.train.sharding import choose_model_to_train, drop_weights, has_shards, join_weights
from inlay.train.step_reader import StepReader, StepValues
from inlay.train.stream import Stream, StreamItems, StreamLoader, StreamSampler
from inlay.train.weight_average import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import evaluate

    Collate = Callable[[list[Any]], dict[str, Any]]

# These hold gradients of their own, which an interrupted backward pass leaves incomplete.
_OWN_GRADIENTS = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass(frozen=True)
class FitResult:
    """The result of a training run.

    Attributes:
        steps: Optimiser steps taken.
        metrics: `loss` and metrics of the best evaluation on the validation data. The model has the weights of this
            evaluation.
        best_step: The step of the best evaluation.
        history: One row per evaluation: step, mean training loss since the previous one, validation loss and metrics.
        seconds: Wall-clock time of all steps and evaluations, over all resumptions.
        steps_per_second: Steps per second spent in steps, without evaluations, since the last start of the run.
        settings: All settings that decided the weights: those given to `fit`, and those of the run.
        resumed: True if the run had been finished or interrupted before.
    """

    steps: int
    metrics: dict[str, float]
    best_step: int
    history: list[dict[str, float]]
    seconds: float
    steps_per_second: float
    settings: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False


def fit(
    model: nn.Module,
    train_data: Any,
    validation_data: Any,
    config: TrainConfig,
    *,
    metrics: "Sequence[evaluate.Metric]" = (),
    collate: "Collate | None" = None,
    loss: Loss | None = None,
    settings: dict[str, Any] | None = None,
    best_by: str | None = None,
    callback: Callback | None = None,
) -> FitResult:
    """Train the parameters of `model` that require a gradient, and leave the model in eval mode with the best weights.

    A killed run resumes from its last checkpoint when it is started again. On a CPU it ends with the same weights, bit
    for bit, as an uninterrupted run. A finished run is read back, not repeated. Weights that were in shards in the run
    (FSDP2, ZeRO 3) are whole again in all processes.

    Args:
        model: Returns an output with `loss` and `logits` when called with a batch (the convention of transformers).
        train_data: Map-style dataset of dicts. Each item is read under its own random seed, so random augmentation that
            uses the global generator of Python, numpy or torch is reproducible. If the dataset has an attribute
            `lengths`, one size per item, a batch holds items of similar size and needs little padding. Or a `Stream`,
            which has no length and needs `config.steps`; a `datasets.IterableDataset` is one whose rows are items.
        validation_data: The same without augmentation. If None, the last weights are kept.
        config: Training settings.
        metrics: `evaluate` metrics over `logits.argmax(-1)` and `labels`. The first one chooses the best evaluation (a
            larger score is better). Without metrics the smallest validation loss is the best.
        collate: Makes a batch from a list of items; default: `torch.utils.data.default_collate`. The second step of a
            `TwoStepCollate` is done on the device.
        loss: The quantity to minimise; default: the loss that the model returns. `NextToken()` for language models.
        settings: Further settings that the run depends on (rank, data ...). A run is resumed only with the same ones.
        best_by: Name of the score that chooses the best evaluation, such as "f1"; default: the score with the name of
            the first metric (`choose_score_name`).
        callback: What else is to be done before the first step and after each evaluation, such as painting samples.

    Raises:
        InlayError: Nothing to train; an impossible launch; a run folder with other settings; NaN or Inf in the loss or
            a gradient; not enough memory for a single example.
    """
    accelerator = start_accelerator(model, config)
    config = _choose_rate(config, model, accelerator)
    decided = {**(settings or {}), **config.identity()}
    stream = Stream.from_data(train_data)
    examples = len(train_data) if stream is None else None
    _check_request(model, examples, validation_data, config, metrics, best_by)
    if has_shards(accelerator):
        _check_whole_weights(config, callback)
    further: dict[str, Any] = {} if best_by is None else {"best_by": best_by}
    further |= stream.identity() if stream else {"examples": examples}
    steps = config.count_steps(examples)
    with open_run(config, model, accelerator, {**further, **(settings or {})}) as run:
        if run.result is not None:
            accelerator.print(f"{run.folder} holds a finished run, which is kept; --overwrite trains it again.")
            run.load_best()
            model.eval()
            return FitResult(**run.result, settings=decided, resumed=True)

        loss = loss or ModelLoss()
        if config.cache_frozen != "no" and (stream or not isinstance(loss, ModelLoss)):
            accelerator.print(
                "cache_frozen stays off: it needs examples of one size, in no stream, and the model's own loss."
            )
            config = replace(config, cache_frozen="no")
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        trained = choose_model_to_train(model, accelerator)
        trainable = [p for p in trained.parameters() if p.requires_grad]
        optimizer = build_optimizer(trainable, config)
        schedule = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
        scheduler = get_scheduler(schedule, optimizer, round(config.warmup * steps), steps)
        net = wrap_for_cache(trained, config, accelerator)
        reader = StepReader(accelerator, optimizer, config.read_every)
        wrapped, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
        average = _average_weights(trainable, config, accelerator)
        drop_weights(model, trained)
        resumed = run.resume(trained, optimizer, scheduler)
        order = _order_examples(stream or train_data, config, steps, run.progress, accelerator)
        if config.tracker is not None:
            accelerator.init_trackers("inlay", config=config.identity())
        trainer = _Trainer(
            accelerator=accelerator,
            model=wrapped,
            optimizer=optimizer,
            scheduler=scheduler,
            run=run,
            config=config,
            steps=steps,
            loss=loss,
            metrics=list(metrics),
            best_by=best_by,
            callback=callback,
            reader=reader,
            average=average,
        )
        if isinstance(collate, TwoStepCollate):
            validation_data = collate.shrink_items(validation_data)
            train_data = collate.shrink_items(stream or train_data)
            stream = Stream.from_data(train_data)
        items = StreamItems(stream, config.seed) if stream else SeededDataset(train_data, config.seed)
        data = FitData(items, validation_data, collate, config.workers, config.prefetch)
        with (
            use_cached_states(net, data, config, accelerator) as data,
            accelerated(net, config, accelerator),
            StopRequest() as stop,
        ):
            loader, validation = build_loaders(data, order, config.batch_size, accelerator)
            read_batch = partial(read_step_batch, data, order, accelerator)
            _, finish = split_collate(data.collate)
            try:
                trainer.train(loader, validation, stop, resumed, read_batch, finish)
            except RuntimeError as error:
                if not stop.signal or "DataLoader worker" not in str(error):
                    raise
                trainer.exit_by_signal(stop.signal)  # the scheduler killed the workers too, before the step had ended
            finally:
                if validation is not None:
                    validation.end_workers()
                release_model(accelerator, wrapped)
        join_weights(model, trained, accelerator.device)
        run.model = model
        if validation_data is None:
            with trainer.final_weights():
                run.save_best()
        run.load_best()
        model.eval()
        done = run.progress
        result = FitResult(
            steps=done.step,
            metrics=done.metrics,
            best_step=done.best_step,
            history=done.history,
            seconds=done.seconds,
            steps_per_second=trainer.steps_per_second(),
            settings=decided,
            resumed=resumed,
        )
        run.finish({k: v for k, v in vars(result).items() if k not in ("settings", "resumed")})
        return result


def _check_request(
    model: nn.Module,
    examples: int | None,
    validation_data: Any,
    config: TrainConfig,
    metrics: "Sequence[evaluate.Metric]",
    best_by: str | None,
) -> None:
    """Refuse a run that has nothing to train, or nothing to choose by; the examples of a stream are not counted."""
    trainable = any(p.requires_grad for p in model.parameters())
    if not trainable or examples == 0:
        raise BadInput(
            "nothing to train: " + ("the data is empty." if trainable else "no parameter requires a gradient.")
        )
    if validation_data is not None and not len(validation_data):
        raise BadInput("the validation data is empty; pass data, or None to keep the last weights.")
    if config.patience is not None and validation_data is None:
        raise BadInput("patience counts evaluations without a new best score, so it needs validation data.")
    if best_by is not None and not metrics:
        raise BadInput(f"best_by={best_by!r} names a score of a metric, but there are no metrics; pass metrics.")


def _check_whole_weights(config: TrainConfig, callback: Callback | None) -> None:
    """Refuse what needs whole weights in one process, which FSDP2 and ZeRO 3 do not leave it."""
    asked = [f"--{name}" for name in ("ema", "channels_last") if getattr(config, name)]
    asked += ["samples and a prior on the way"] if callback is not None else []
    if asked:
        raise Unsupported(
            f"{' and '.join(asked)} cannot be had from weights in shards (FSDP2, ZeRO 3); start without, or with "
            "--multi_gpu."
        )


def _choose_rate(config: TrainConfig, model: nn.Module, accelerator: Accelerator) -> TrainConfig:
    """The config with a learning rate: as it was given, else one that suits the width of the base."""
    if config.learning_rate is not None:
        return config
    rate = float(f"{scale_rate(config.embedded_rate, model):.3g}")
    if rate < config.embedded_rate:
        accelerator.print(
            f"learning rate {rate:g} for a base this wide ({config.embedded_rate:g} suits the embedded ones); "
            "--learning_rate sets another."
        )
    return replace(config, learning_rate=rate)


def _average_weights(
    trainable: list[nn.Parameter], config: TrainConfig, accelerator: Accelerator
) -> WeightAverage | None:
    """The moving average that `ema` asks for, which accelerate then stores with each checkpoint."""
    if config.ema is None:
        return None
    average = WeightAverage(trainable, config.ema)
    accelerator.register_for_checkpointing(average)
    return average


def _order_examples(
    train_data: Any, config: TrainConfig, steps: int, progress: Progress, accelerator: Accelerator
) -> SeededSampler | StreamSampler:
    """The batches that are left of a run."""
    if isinstance(train_data, Stream):
        processes = accelerator.num_processes
        return StreamSampler(
            train_data,
            config.batch_size // processes,
            steps,
            config.seed,
            done=progress.step,
            positions=progress.stream,
            process=accelerator.process_index,
            processes=processes,
        )
    lengths = getattr(train_data, "lengths", None)
    return SeededSampler(len(train_data), config.batch_size, steps, config.seed, done=progress.step, lengths=lengths)


@dataclass
class _Trainer:
    """The loop of one run, and the objects it works with."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    run: Run
    config: TrainConfig
    steps: int
    loss: Loss
    metrics: "list[evaluate.Metric]"
    best_by: str | None
    callback: Callback | None
    reader: StepReader
    average: WeightAverage | None
    skipped: int = field(default=0, init=False)  # fp16 steps in a row whose gradient overflowed
    step_seconds: float = field(default=0.0, init=False)
    steps_here: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.eval_every = self.config.count_steps_to_evaluation(self.steps)
        # Frozen weights have no gradient, but accelerate tells a model in shards by its whole list.
        self.clipped = [p for p in self.model.parameters() if p.requires_grad or has_shards(self.accelerator)]

    def train(
        self,
        loader: Any,
        validation: Any,
        stop: StopRequest,
        resumed: bool,
        read_batch: "Callable[[int], Any]",
        finish: "Callable[[dict[str, Any]], dict[str, Any]]",
    ) -> None:
        """Take all steps that are left.

        `read_batch(step)` reads the batch of an earlier step again, and `finish` makes the inputs of a model of a batch
        or a piece of one.
        """
        progress, config = self.run.progress, self.config
        self.read_batch, self.finish = read_batch, finish
        if (callback := self.callback) is not None:
            self._call_on_main(lambda: callback.begin(self.run.folder))
        hidden = None if self.accelerator.is_local_main_process else True  # None hides the bar without a terminal
        self.bar = bar = tqdm(
            total=self.steps,
            initial=progress.step,
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
            leave=False,
        )
        if resumed:
            self.accelerator.print(f"resumed at step {progress.step} of {self.steps}")
        set_train_mode(self.model)
        self._evaluate_start(validation, bar)
        begun = time.perf_counter()
        for batch in loader:
            at = time.perf_counter()
            stopped = self._take_step(batch, progress.step, stop)
            progress.step += 1
            last = progress.step == self.steps
            evaluated = last or progress.step % self.eval_every == 0
            due = progress.step % config.save_every == 0 if config.save_every else evaluated
            if len(self.reader) and (evaluated or due):  # no weights are kept of a step that has not been read
                stopped = self._read_steps(stop)
            bar.update()
            self.step_seconds += time.perf_counter() - at
            self.steps_here += 1

            if evaluated:
                with self.final_weights():
                    self._evaluate(validation, bar)
            if evaluated and config.patience is not None and progress.waited >= config.patience:
                if self.accelerator.is_main_process:
                    bar.write(f"stopped early: no new best score in {config.patience} evaluations")
                last = True
            now = time.perf_counter()
            progress.seconds += now - begun
            begun = now
            if stopped or (due and not last):
                if isinstance(loader, StreamLoader):
                    progress.stream = loader.find_positions(progress.step)
                self.run.save_checkpoint()
            if last:
                break
            if stopped:
                bar.close()
                self.exit_by_signal(stopped)
        bar.close()

    def final_weights(self) -> "AbstractContextManager[None]":
        """A block in which the model has the weights that are evaluated and kept: its own, or their average."""
        return nullcontext() if self.average is None else self.average.in_place_of_weights()

    def exit_by_signal(self, signal_: int) -> None:
        """End the process with the status of the signal; the last checkpoint is on disk."""
        self.accelerator.print(
            f"stopped by {signal.Signals(signal_).name} after step {self.run.progress.step} of {self.steps}; the same "
            f"command resumes from the checkpoint in {self.run.folder}."
        )
        raise SystemExit(128 + signal_)

    def steps_per_second(self) -> float:
        """Speed of the steps that this process took, without evaluations and start-up."""
        return self.steps_here / self.step_seconds if self.step_seconds else 0.0

    def _take_step(self, batch: dict[str, Any], step: int, stop: StopRequest) -> int:
        """Forward and backward in pieces, clip, update. Returns the stop signal, if it has been read."""
        accelerator, run = self.accelerator, self.run
        while True:
            self._seed_step(step)  # dropout depends on the step only, so a resumed run draws the same
            try:
                loss = self._forward_backward(batch, run.progress.accumulate)
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                reason = str(error).splitlines()[0]
            self._halve_pieces(batch, reason)  # outside the handler, because the error holds the activations
        norm = accelerator.clip_grad_norm_(self.clipped, self.config.clip_norm)
        self.reader.add(step + 1, self.scheduler.get_last_lr()[0], loss, norm)
        alone = accelerator.num_processes == 1
        stopped = self._read_steps(stop, batch) if self.reader.full or (alone and stop.signal) else 0
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return stopped

    def _read_steps(self, stop: StopRequest, newest: dict[str, Any] | None = None) -> int:
        """Read the values of the latest steps, log them, and stop at NaN or Inf; `newest` is the batch of the last one.

        Returns:
            The stop signal, which is the same in all processes.
        """
        progress = self.run.progress
        read, stopped = self.reader.read(stop.signal)
        for values in read:
            if not self._may_go_on(values):
                batch = newest if newest is not None and values is read[-1] else self.read_batch(values.step - 1)
                self._explain_break(values, batch)
            progress.loss_sum += values.loss
            progress.loss_count += 1
            row = {
                "loss": values.loss,
                "learning_rate": values.learning_rate,
                "gradient_norm": values.gradient_norm,
            }
            self.run.log({"step": values.step, **row})
            if self.config.tracker is not None:
                self.accelerator.log(row, step=values.step)
        self.bar.set_postfix_str(f"loss {read[-1].loss:.4f}", refresh=False)
        return stopped

    def _forward_backward(self, batch: dict[str, Any], accumulate: int) -> torch.Tensor:
        """Add up the gradient of the mean loss over this process's share of the batch, in `accumulate` pieces.

        The mean of the gradients of all processes is the gradient of the whole batch, even if their shares hold
        different numbers of tokens.
        """
        total = torch.zeros((), device=self.accelerator.device)
        weight = self._mean_weight(batch)
        pieces = list(split_batch(batch, accumulate))
        for i, piece in enumerate(pieces):
            share = self._share_of(piece, weight)
            inputs = self._place(piece)
            with nullcontext() if i == len(pieces) - 1 else self._without_update():
                loss = self.loss(self.model, inputs).loss * share
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    @contextmanager
    def _without_update(self) -> "Iterator[None]":
        """Add up gradients without exchanging them; DeepSpeed's engine steps after each backward pass outside."""
        with self.accelerator.no_sync(self.model):
            self.accelerator.sync_gradients = False
            try:
                yield
            finally:
                self.accelerator.sync_gradients = True

    def _mean_weight(self, batch: dict[str, Any]) -> "float | torch.Tensor":
        """The weight of the whole batch, divided by the number of processes that share it; then it is on the device."""
        weight = float(self.loss.weight(batch))
        if self.accelerator.num_processes == 1 or isinstance(self.loss, ModelLoss):
            return weight
        return self.accelerator.reduce(torch.full((), weight, device=self.accelerator.device), "mean")

    def _share_of(self, piece: dict[str, Any], whole: "float | torch.Tensor") -> "float | torch.Tensor":
        """The share of a piece in the loss of a batch of this weight; 0 if no row has anything to learn."""
        weight = self.loss.weight(piece)
        if isinstance(whole, torch.Tensor):  # it is not read: the device divides
            return torch.full_like(whole, weight) / whole.clamp_min(torch.finfo(whole.dtype).tiny)
        return weight / whole if whole else 0.0

    def _place(self, piece: dict[str, Any]) -> dict[str, Any]:
        """A piece of a batch on the device, finished, with what the loss has to read of it while it is on the CPU."""
        prepare = getattr(self.loss, "prepare", None)
        prepared = piece if prepare is None else prepare(piece)
        placed = send_to_device(prepared, self.accelerator.device, non_blocking=self.accelerator.non_blocking)
        return self.finish(placed)

    def _seed_step(self, step: int) -> None:
        """Seed the global generators; those of accelerators take longer than a small step, and a CPU has none."""
        seed = seed_all if is_asynchronous(self.accelerator.device) else seed_cpu
        seed(self._seed_of_step(step))

    def _seed_of_step(self, step: int) -> int:
        """A different seed for every step and process."""
        accelerator = self.accelerator
        return self.config.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index

    def _halve_pieces(self, batch: dict[str, Any], reason: str) -> None:
        """Halve the pieces after an out-of-memory error; the step is then repeated with the same seed and result."""
        if self.accelerator.num_processes > 1 or self.accelerator.distributed_type in _OWN_GRADIENTS:
            raise ComputationFailed(
                f"out of memory in process {self.accelerator.process_index} ({reason}); with several processes, FSDP2 "
                f"or DeepSpeed the pieces cannot be halved during a run: start again with --accumulate "
                f"{2 * self.run.progress.accumulate}, or --gradient_checkpointing."
            )
        if self.run.progress.accumulate >= count_rows(batch):
            raise ComputationFailed(
                f"out of memory with a single example ({reason}); try --gradient_checkpointing, an 8-bit base, a lower "
                "precision or a smaller input."
            )
        self.run.progress.accumulate *= 2
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        tqdm.write(
            f"out of memory: each step is now computed in {self.run.progress.accumulate} pieces, with the same result"
        )

    def _may_go_on(self, values: StepValues) -> bool:
        """False at NaN or Inf. An fp16 gradient may overflow up to 50 times in a row; its scaler skips such a step."""
        if values.finite:
            self.skipped = 0
            return True
        if math.isfinite(values.loss) and self.accelerator.mixed_precision == "fp16" and self.skipped < 50:
            self.skipped += 1
            return True
        return False

    def _explain_break(self, values: StepValues, batch: dict[str, Any]) -> NoReturn:
        """Repeat a step that broke, and say where; the weights are those that it was taken with."""
        self._seed_step(values.step - 1)
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):  # compiled modules have no hooks
            found = find_first_bad_number(  # every process is here, as the loss is their mean
                self.accelerator.unwrap_model(self.model),
                self.finish(send_to_device(batch, self.accelerator.device)),
                self.loss,
                self.run.progress.accumulate,
            )
        where = found or "when the step is repeated, input, weights, outputs and gradients are all finite"
        raise ComputationFailed(
            f"training broke at step {values.step}: loss {values.loss}, gradient norm {values.gradient_norm}; {where}. "
            f"The weights of the last checkpoint are untouched. Try a lower --learning_rate, or check the data."
        )

    def _evaluate_start(self, loader: Any, bar: Any) -> None:
        """Evaluate the weights with which a run begins, where that is asked for."""
        if self.config.eval_start and loader is not None and self.run.progress.step == 0:
            self._evaluate(loader, bar)

    def _evaluate(self, loader: Any, bar: Any) -> None:
        """Evaluate, save the weights if they are the best so far, and print one line."""
        progress = self.run.progress
        row: dict[str, float] = {"step": progress.step}
        if progress.loss_count:  # none before the first step
            row["train_loss"] = progress.loss_sum / progress.loss_count
        progress.loss_sum, progress.loss_count = 0.0, 0
        if loader is not None:
            scores, chooses = evaluate_on(
                self.model, loader, self.loss, self.metrics, self.accelerator, progress.accumulate, self.best_by
            )
            if not math.isfinite(scores["loss"]):
                raise ComputationFailed(
                    f"the validation loss at step {progress.step} is {scores['loss']}, but the training loss is "
                    "finite; look for NaN or Inf in the validation data."
                )
            value = scores[chooses] if self.metrics else -scores["loss"]  # without metrics the smallest loss is best
            better = progress.best is None or value > progress.best
            if better:
                progress.best, progress.best_step = value, progress.step
                progress.metrics, progress.waited = scores, 0
                self.run.save_best()
            else:
                progress.waited += 1
            row |= scores
            self.run.log(row)
            if self.config.tracker is not None:
                self.accelerator.log({f"validation_{k}": v for k, v in scores.items()}, step=progress.step)
        else:
            better = False
            progress.best_step, progress.metrics = progress.step, {"train_loss": row["train_loss"]}
        progress.history.append(row)
        if self.accelerator.is_main_process:
            shown = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "step")
            bar.write(f"step {progress.step:>5}/{self.steps}  {shown}{'  best' if better else ''}")
        if (callback := self.callback) is not None:
            self._call_on_main(lambda: callback.evaluated(progress.step))

    def _call_on_main(self, call: "Callable[[], None]") -> None:
        """Call something on the main process with the model in eval mode; then all processes go on."""
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            model.eval()
            call()
            set_train_mode(model)
        self.accelerator.wait_for_everyone()
