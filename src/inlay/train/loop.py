"""The training loop: one page, top to bottom, on accelerate."""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from inlay.errors import BadInput, ComputationFailed
from inlay.train.config import TrainConfig
from inlay.train.evaluation import count_rows, evaluate_on, split_batch, train_mode
from inlay.train.frozen_cache.shorten import FitData, use_cached_states, wrap_tail
from inlay.train.guards import StopRequest, find_first_bad_number
from inlay.train.launch import build_loaders, build_optimizer, enable_checkpointing, release_model, start_accelerator
from inlay.train.losses import Loss, ModelLoss
from inlay.train.run import Run, open_run
from inlay.train.sampler import SeededDataset, SeededSampler, seed_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import evaluate

    Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        steps: Optimiser steps taken.
        metrics: `loss` and the metrics on the validation data, of the best evaluation, whose weights the model has.
        best_step: The step of that evaluation.
        history: One row an evaluation: step, training loss since the last one, validation loss and metrics.
        seconds: Wall-clock time of all steps and evaluations, over all resumptions.
        steps_per_second: Steps by the time spent in steps alone, of the last process.
        settings: All that decided the weights: those given to `fit`, and those of the run.
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
) -> FitResult:
    """Train what requires a gradient in `model`, and leave the best weights in it, in eval mode.

    A run that is killed goes on from its last checkpoint when it is started again, and ends with the same weights, bit
    for bit on a CPU, as one that was not. A finished run is read back, not repeated.

    Args:
        model: Returns an output with `loss` and `logits` when called with a batch (the convention of transformers).
        train_data: Map-style dataset of dicts. Items are drawn under a seed of their own, so random augmentation that
            uses Python's, numpy's or torch's global generator is reproducible. With an attribute `lengths`, a size for
            each item, a batch is made of items of about one size: little of it is padding.
        validation_data: The same without augmentation, or None: then the last weights are kept.
        config: How to train.
        metrics: `evaluate` metrics over `logits.argmax(-1)` and `labels`. The first one decides which evaluation is the
            best (more is better); without metrics the validation loss does.
        collate: Makes a batch of a list of items; default `torch.utils.data.default_collate`.
        loss: What is made small; default: what the model itself gives. `NextToken()` for language models.
        settings: Further settings that the run depends on (rank, data ...): a resumption must have the same.
        best_by: Name of the score that decides instead, such as "f1"; default: the score that the first metric is
            named after (`name_of_best`).

    Raises:
        InlayError: Nothing to train, an impossible launch, a run folder with other settings, NaN or Inf in loss or
            gradient, not enough memory for a single example.
    """
    decided = {**(settings or {}), **config.identity()}
    accelerator = start_accelerator(model, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable or not len(train_data):
        raise BadInput(
            "nothing to train: " + ("the data is empty." if trainable else "no parameter requires a gradient.")
        )
    if validation_data is not None and not len(validation_data):
        raise BadInput("the validation data is empty; give some, or None to keep the last weights.")
    if config.patience is not None and validation_data is None:
        raise BadInput("patience counts evaluations without a new best: it needs validation data.")
    if best_by is not None and not metrics:
        raise BadInput(f"best_by={best_by!r} names a score of a metric, but there are no metrics; give some.")
    further = {} if best_by is None else {"best_by": best_by}
    with open_run(config, model, accelerator, {"examples": len(train_data), **further, **(settings or {})}) as run:
        if run.result is not None:
            accelerator.print(f"{run.folder} holds a finished run: kept as it is (--overwrite trains anew).")
            run.load_best()
            model.eval()
            return FitResult(**run.result, settings=decided, resumed=True)

        steps, loss = config.steps(len(train_data)), loss or ModelLoss()
        if config.cache_frozen != "no" and not isinstance(loss, ModelLoss):
            accelerator.print(
                "cache_frozen stays off: it keeps states of examples of one size, with the model's own loss."
            )
            config = replace(config, cache_frozen="no")
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        optimizer = build_optimizer(trainable, config)
        schedule = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
        scheduler = get_scheduler(schedule, optimizer, round(config.warmup * steps), steps)
        net = wrap_tail(model, config, accelerator)
        wrapped, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
        resumed = run.resume()
        lengths = getattr(train_data, "lengths", None)
        order = SeededSampler(
            len(train_data), config.batch_size, steps, config.seed, done=run.progress.step, lengths=lengths
        )
        if config.tracker is not None:
            accelerator.init_trackers("inlay", config=config.identity())
        trainer = _Trainer(accelerator, wrapped, optimizer, scheduler, run, config, steps, loss, list(metrics), best_by)
        data = FitData(SeededDataset(train_data, config.seed), validation_data, collate, config.workers)
        with use_cached_states(net, data, config, accelerator) as data, StopRequest() as stop:
            loader, validation = build_loaders(data, order, config.batch_size, accelerator)
            try:
                trainer.train(loader, validation, stop, resumed)
            except RuntimeError as error:
                if not stop.signal or "DataLoader worker" not in str(error):
                    raise
                trainer.leave(stop.signal)  # the scheduler has killed the workers too, before the step was done
            finally:
                release_model(accelerator, wrapped)
        if validation_data is None:
            run.keep_best()
        run.load_best()
        model.eval()
        done = run.progress
        result = FitResult(
            done.step, done.metrics, done.best_step, done.history, done.seconds, trainer.rate(), decided, resumed
        )
        run.finish({k: v for k, v in vars(result).items() if k not in ("settings", "resumed")})
        return result


class _Trainer:
    """The objects of one run, and what is done with them."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        run: Run,
        config: TrainConfig,
        steps: int,
        loss: Loss,
        metrics: "list[evaluate.Metric]",
        best_by: str | None,
    ) -> None:
        self.best_by = best_by
        self.accelerator, self.model, self.optimizer, self.scheduler = accelerator, model, optimizer, scheduler
        self.run, self.config, self.steps, self.loss, self.metrics = run, config, steps, loss, metrics
        self.eval_every = config.eval_every or max(1, round(steps / config.epochs))
        self.skipped = 0  # fp16 steps in a row whose gradient overflowed
        self.step_seconds, self.steps_here = 0.0, 0

    def train(self, loader: Any, validation: Any, stop: StopRequest, resumed: bool) -> None:
        progress, config = self.run.progress, self.config
        hidden = None if self.accelerator.is_local_main_process else True  # None: hidden where there is no terminal
        bar = tqdm(
            total=self.steps,
            initial=progress.step,
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
            leave=False,
        )
        if resumed:
            self.accelerator.print(f"resumed at step {progress.step} of {self.steps}")
        train_mode(self.model)
        begun = time.perf_counter()
        for batch in loader:
            at = time.perf_counter()
            rate = self.scheduler.get_last_lr()[0]
            loss, norm, stopped = self._step(batch, progress.step, stop)
            progress.step += 1
            progress.loss_sum, progress.loss_count = progress.loss_sum + loss, progress.loss_count + 1
            self.run.log({"step": progress.step, "loss": loss, "learning_rate": rate, "gradient_norm": norm})
            if config.tracker is not None:
                self.accelerator.log({"loss": loss, "learning_rate": rate, "gradient_norm": norm}, step=progress.step)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            self.step_seconds, self.steps_here = (
                self.step_seconds + time.perf_counter() - at,
                self.steps_here + 1,
            )

            last = progress.step == self.steps
            evaluated = last or progress.step % self.eval_every == 0
            if evaluated:
                self._evaluate(validation, bar)
            if evaluated and config.patience is not None and progress.waited >= config.patience:
                if self.accelerator.is_main_process:
                    bar.write(f"stopped early: no better evaluation in {config.patience}")
                last = True
            progress.seconds, begun = progress.seconds + time.perf_counter() - begun, time.perf_counter()
            due = progress.step % config.save_every == 0 if config.save_every else evaluated
            if stopped or (due and not last):
                self.run.checkpoint()
            if last:
                break
            if stopped:
                bar.close()
                self.leave(stopped)
        bar.close()

    def leave(self, signal_: int) -> None:
        """End the process as the signal would have, once the run is safe on disk."""
        self.accelerator.print(
            f"stopped by {signal.Signals(signal_).name} after step {self.run.progress.step} of {self.steps}; the same "
            f"command goes on from the checkpoint in {self.run.folder}."
        )
        raise SystemExit(128 + signal_)

    def rate(self) -> float:
        """Steps per second of the steps that this process took, evaluations and start-up left out."""
        return self.steps_here / self.step_seconds if self.step_seconds else 0.0

    def _step(self, batch: dict[str, Any], step: int, stop: StopRequest) -> tuple[float, float, int]:
        """One optimiser step: forward and backward in pieces, clip, update. Gives loss, gradient norm, stop signal."""
        accelerator, run = self.accelerator, self.run
        while True:
            seed_all(self._seed(step))  # dropout: a function of the step, so a resumed run draws the same
            try:
                loss = self._forward_backward(batch, run.progress.accumulate)
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                reason = str(error).splitlines()[0]
            self._back_off(batch, reason)  # not in the handler, as the error holds the activations
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        norm = torch.zeros(()) if norm is None else norm  # DeepSpeed clips by itself
        if accelerator.num_processes > 1:  # all must agree on the step after which they stop
            each = accelerator.gather(torch.stack([loss, loss.new_tensor(stop.signal)])[None])  # a row per process
            loss, signal_ = each[:, 0].mean(), int(each[:, 1].max())
        else:
            signal_ = stop.signal
        loss_value, norm_value = loss.item(), float(norm)
        self._check(loss_value, norm_value, batch, step)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss_value, norm_value, signal_

    def _forward_backward(self, batch: dict[str, Any], accumulate: int) -> torch.Tensor:
        """Add the gradient of the mean loss of this process's share of the batch, `accumulate` pieces in turn.

        The mean of the processes' gradients is then that of the whole batch, also where its share holds more tokens.
        """
        total = torch.zeros((), device=self.accelerator.device)
        whole = self._mean_weight(batch)
        cut = list(split_batch(batch, accumulate))
        for i, piece in enumerate(cut):
            with nullcontext() if i == len(cut) - 1 else self.accelerator.no_sync(self.model):
                loss = self.loss(self.model, piece).loss * (self.loss.weight(piece) / whole)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _mean_weight(self, batch: dict[str, Any]) -> float:
        """The weight of the whole batch, by the number of processes that share it."""
        weight = float(self.loss.weight(batch))
        if self.accelerator.num_processes == 1 or isinstance(self.loss, ModelLoss):
            return weight
        return float(self.accelerator.reduce(torch.tensor(weight, device=self.accelerator.device), "mean"))

    def _seed(self, step: int) -> int:
        """Another one for every step and process."""
        accelerator = self.accelerator
        return self.config.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index

    def _back_off(self, batch: dict[str, Any], reason: str) -> None:
        """Out of memory: halve the pieces. The step is taken anew with the same seed, so the result is the same."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it steps on every piece
            raise ComputationFailed(
                f"out of memory in process {self.accelerator.process_index} ({reason}); start again with a smaller "
                "--batch_size, or --gradient_checkpointing."
            )
        if self.accelerator.num_processes > 1:
            raise ComputationFailed(
                f"out of memory in process {self.accelerator.process_index} ({reason}); with "
                f"several processes the pieces are not halved on the way: start again with --accumulate "
                f"{2 * self.run.progress.accumulate}, or --gradient_checkpointing."
            )
        if self.run.progress.accumulate >= count_rows(batch):
            raise ComputationFailed(
                f"out of memory with a single example ({reason}); try --gradient_checkpointing, an "
                "8-bit base, a lower precision or a smaller input."
            )
        self.run.progress.accumulate *= 2
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        tqdm.write(
            f"out of memory: a step is now computed in {self.run.progress.accumulate} pieces, with the same result"
        )

    def _check(self, loss: float, norm: float, batch: dict[str, Any], step: int) -> None:
        """Refuse to go on from NaN or Inf; an fp16 gradient may overflow, its scaler skips the step (not for ever)."""
        finite = loss - loss == 0.0
        if finite and norm - norm == 0.0:
            self.skipped = 0
            return
        if finite and self.accelerator.mixed_precision == "fp16" and self.skipped < 50:
            self.skipped += 1
            return
        seed_all(self._seed(step))
        with self.accelerator.autocast():
            found = find_first_bad_number(
                self.accelerator.unwrap_model(self.model), batch, self.loss, self.run.progress.accumulate
            )
        found = next(filter(None, gather_object([found])), None)  # all processes are here: the loss is their mean
        where = found or "neither input, weights, outputs nor gradients show it when the step is repeated"
        raise ComputationFailed(
            f"training broke at step {step + 1}: loss {loss}, gradient norm {norm}; {where}. "
            f"The weights of the last checkpoint are untouched. Try a lower --learning_rate, or check the data."
        )

    def _evaluate(self, loader: Any, bar: Any) -> None:
        """Evaluate, keep the weights if they are the best so far, and report one line."""
        progress = self.run.progress
        row = {"step": progress.step, "train_loss": progress.loss_sum / progress.loss_count}
        progress.loss_sum, progress.loss_count = 0.0, 0
        if loader is not None:
            scores, chooses = evaluate_on(
                self.model, loader, self.loss, self.metrics, self.accelerator, progress.accumulate, self.best_by
            )
            if not math.isfinite(scores["loss"]):
                raise ComputationFailed(
                    f"the validation loss at step {progress.step} is {scores['loss']}, but the training loss is not: "
                    "look for NaN or Inf in the validation data."
                )
            value = scores[chooses] if self.metrics else -scores["loss"]  # without metrics less loss is better
            better = progress.best is None or value > progress.best
            if better:
                progress.best, progress.best_step, progress.metrics, progress.waited = (
                    value,
                    progress.step,
                    scores,
                    0,
                )
                self.run.keep_best()
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
