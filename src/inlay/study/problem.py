"""What a study asks: a task with its data and training, and the runs of trials on one base that is loaded once."""

import copy
import io
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn

from inlay.bases.load import find_size
from inlay.errors import BadInput, DamagedFile, InlayError, Unreachable, Unsupported
from inlay.measure import footprint
from inlay.methods import METHODS
from inlay.methods._peft import PeftModel
from inlay.study.costs import measure_trial
from inlay.study.forgetting import RememberedBase, measure_forgetting, remember_base
from inlay.study.priors import start_rate
from inlay.study.records import FILE, Records
from inlay.study.sites import narrow_sites
from inlay.study.trial import Outcome, Trial
from inlay.tasks import task_of_options
from inlay.tasks.adapter import TaskModel
from inlay.tasks.base import load_skeleton
from inlay.tasks.evaluation import Request
from inlay.tasks.options import Parts, TaskData, TaskOptions
from inlay.train.config import TrainConfig
from inlay.train.launch import enable_checkpointing
from inlay.train.loop import FitResult, fit

# Of TrainConfig: what a trial says itself, or what follows from it.
_OF_A_TRIAL = ("learning_rate", "seed", "epochs")
_WARM_UP, _TIMED = 2, 10  # steps of which the time of one is measured


class Problem:
    """A task, its data and how to train, on which trials are run one after the other.

    Data and base are loaded once for all trials, which begin with a copy of the base and with the state that the
    generators of random numbers had after it was loaded: what a trial computes does not depend on those before it.

    Attributes:
        task: The options of the task.
        train: How every trial is trained, but for the learning rate, the seed and the steps, which are the trial's.
        folder: Holds `trials.jsonl`, and a folder of each trial.
        split_seed: Chooses what is held out where the data does not.
        base_data: Data of what the base was pre-trained for, as in `remember_base`.
        row: Of TASKS.
        score: The main score, of the test part and of the part that chooses.
        larger_is_better: Of the main score.
    """

    def __init__(
        self,
        task: TaskOptions,
        train: TrainConfig,
        folder: str | Path,
        split_seed: int = 0,
        *,
        base_data: str | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Raises:
            InlayError: Several processes that were launched together.
        """
        if PartialState().num_processes > 1:
            raise BadInput("a study starts its own processes; start it as one process, and give jobs=2 or more.")
        self.task, self.train, self.folder, self.split_seed = task, train, Path(folder).expanduser(), split_seed
        self.row = task_of_options(task)
        self.score, self.larger_is_better = self.row.main_score, not self.row.smaller_is_better
        self.base_data = base_data
        self._base: tuple[int, Any, _RandomState] | None = None

    @cached_property
    def parts(self) -> Parts:
        """The part to train on, the part that chooses, and the test part."""
        return self.task.load_parts(self.split_seed)

    @property
    def data(self) -> TaskData:
        """The training part and the part that chooses, as the base takes them."""
        return self.parts.data

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        return self.train.batch_size

    @property
    def steps(self) -> int:
        """Of a trial that names none: the epochs of `train`."""
        return self.train.count_steps(len(self.data.train))

    @cached_property
    def base(self) -> dict[str, Any]:
        """Facts of the base: name, kind of model, parameters, number of blocks, width of their output."""
        model = self.load_base_skeleton()
        blocks, width = find_size(model.config)
        return {
            "name": self.task.model,
            "model_type": model.config.model_type,
            "parameters": footprint(model).parameters,
            "blocks": blocks,
            "width": width,
        }

    @cached_property
    def remembered(self) -> RememberedBase:
        """The base without any training, with which trials are compared.

        Raises:
            InlayError: `base_data` that cannot be used.
        """
        return remember_base(self._copy_base(0), self.row, self.data, base_data=self.base_data)

    @cached_property
    def records(self) -> Records:
        """The finished trials in `folder`.

        Raises:
            InlayError: They are of another task, data or training, or the file is damaged.
        """
        return Records(self.folder / FILE, self.settings())

    def settings(self) -> dict[str, Any]:
        """What decides the outcome of a trial besides the trial itself."""
        train = {key: value for key, value in self.train.identity().items() if key not in _OF_A_TRIAL}
        return {
            "task": self.row.name,
            **asdict(self.task),
            **train,
            "split_seed": self.split_seed,
            "base_data": self.base_data,
            "counts": self.parts.counts,
        }

    def fits(self, names: Sequence[str] | None = None, width: int = 8) -> tuple[list[str], dict[str, str]]:
        """Which methods fit the base, found without its weights, unless they are held in few bits.

        Args:
            names: Of METHODS; None: all of them but those that change the base, of which no adapter can be saved.
            width: Of their adapters.

        Returns:
            Names in the order of METHODS, or as they were given; and of the others, by name, why not.

        Raises:
            InlayError: An unknown name.
        """
        unknown = [name for name in names or () if name not in METHODS]
        if unknown:
            raise BadInput(f"unknown method {unknown[0]!r}; choose some of {', '.join(METHODS)}, or all.")
        refused: dict[str, str] = {}
        for name in METHODS if names is None else names:
            if names is None and METHODS[name].starts_from_weights:
                refused[name] = "changes the base's weights; name it to compare it."
                continue
            try:
                self._check_fit(Trial(name, METHODS[name].learning_rate, width))
            except Exception as error:  # peft and models fail in any way on a base that a method does not know
                refused[name] = _explain(error)
        return [name for name in (METHODS if names is None else names) if name not in refused], refused

    def skeleton(self, trial: Trial) -> nn.Module:
        """The model of a trial without its weights, on the meta device, for counting.

        Raises:
            InlayError: The method does not fit the base.
        """
        return self._attach(self.load_base_skeleton(), trial)

    def adapt(self, trial: Trial) -> nn.Module:
        """The model of a trial before its first step.

        Raises:
            InlayError: The method does not fit the base.
        """
        return self._attach(self._copy_base(trial.seed), trial)

    def complete(self, trial: Trial) -> Trial:
        """The trial with a number of steps: those of the budget, if it names none."""
        return trial if trial.steps else replace(trial, steps=self.steps)

    def run(self, trial: Trial, *, test: bool = False, costs: bool = False, forgetting: bool = False) -> Outcome:
        """Train and score a trial, or read it back; a trial that was killed goes on where it was.

        Args:
            trial: What to train.
            test: Score it on the part that chooses nothing.
            costs: Measure what it costs.
            forgetting: Measure what its base has lost.

        Returns:
            The outcome; one that failed (NaN, not enough memory) says why.

        Raises:
            InlayError: The folder is of another study; data or base cannot be loaded.
        """
        trial = self.complete(trial)
        missing = self.list_missing(trial, name_measured(test=test, costs=costs, forgetting=forgetting))
        return self.records.read(trial) if missing is None else self.record(self.compute(trial, missing), missing)

    def list_missing(self, trial: Trial, measured: Collection[str]) -> frozenset[str] | None:
        """What of `measured` is not in the records yet of a trial; None: it is all there, or the trial failed."""
        found = self.records.find(trial)
        if found is None:
            return frozenset(measured)
        missing = frozenset(measured) - self.records.list_measured(trial)
        return None if found.failed or not missing else missing

    def record(self, outcome: Outcome, measured: Collection[str]) -> Outcome:
        """Add what `compute` gave to the records, and to what they have of the trial from before."""
        earlier = self.records.find(outcome.trial)
        if earlier is not None and not outcome.failed:
            outcome = replace(
                outcome,
                test=outcome.test if "test" in measured else earlier.test,
                costs=outcome.costs if "costs" in measured else earlier.costs,
                forgetting=outcome.forgetting if "forgetting" in measured else earlier.forgetting,
                seconds=outcome.seconds + earlier.seconds,
            )
        self.records.add(outcome, {*measured, *self.records.list_measured(outcome.trial)})
        return outcome

    def compute(self, trial: Trial, measured: Collection[str] = ()) -> Outcome:
        """Train and score a trial without reading or writing the records, as a worker process does.

        Args:
            trial: With its number of steps.
            measured: What of test, costs and forgetting is measured after the training.
        """
        begun = time.perf_counter()
        try:
            adapted = self.adapt(trial)
            result = self._fit(adapted, trial)
            outcome = Outcome(trial, validation=dict(result.metrics))
            if "test" in measured:
                outcome = replace(outcome, test=self._score(self.wrap(trial, adapted)))
            if "costs" in measured:
                costs = measure_trial(adapted, self.data, self.train)
                outcome = replace(outcome, costs={**costs, "steps_per_second": result.steps_per_second})
            if "forgetting" in measured:
                outcome = replace(outcome, forgetting=measure_forgetting(adapted, self.remembered))
        except (OSError, BadInput, DamagedFile, Unreachable):  # of the study, not of the trial
            raise
        except Exception as error:  # NaN, no memory, whatever a model raises on inputs that it does not take
            outcome = Outcome(trial, failed=_explain(error))
        return replace(outcome, seconds=time.perf_counter() - begun)

    def load_trained(self, trial: Trial) -> tuple[TaskModel, FitResult]:
        """The model of a trial with its best weights: those in its folder, or trained again.

        Raises:
            InlayError: The method does not fit the base; the training failed.
        """
        trial = self.complete(trial)
        adapted = self.adapt(trial)
        result = self._fit(adapted, trial)
        return self.wrap(trial, adapted), result

    def start_rate(self, method: str, width: int) -> float:
        """The learning rate with which the search of a method starts."""
        return start_rate(method, self.load_base_skeleton(), width, task=self.row.name)

    def measure_step(self, trial: Trial) -> float:
        """Seconds that a training step of a trial takes here, of its method and width; measured once for a study."""
        name = f"{trial.method} {trial.width}"
        if name not in self.records.seconds_per_step:
            seconds = [self._time_steps(replace(trial, steps=steps)) for steps in (_WARM_UP, _WARM_UP + _TIMED)]
            self.records.add_seconds_per_step(name, max(seconds[1] - seconds[0], 1e-9) / _TIMED)
        return self.records.seconds_per_step[name]

    def _time_steps(self, trial: Trial) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return self._fit(self.adapt(trial), trial, folder=folder, validate=False).seconds

    def make_train_config(self, trial: Trial) -> TrainConfig:
        """How `fit` trains a trial."""
        examples, batch_size = len(self.data.train), self.train.batch_size
        return replace(
            self.train,
            output_dir=str(self.folder_of(trial)),
            overwrite=False,
            learning_rate=trial.learning_rate,
            seed=trial.seed,
            steps=None,
            epochs=(self.complete(trial).steps - 0.5) * batch_size / examples,  # rounded up to the steps
            eval_every=self.train.eval_every or max(1, round(examples / batch_size)),
        )

    def folder_of(self, trial: Trial) -> Path:
        """Where a trial is trained; its best weights stay there until `delete_weights`."""
        return self.folder / "trials" / self.complete(trial).key

    def delete_weights(self, trial: Trial) -> None:
        """Delete the folder of a finished trial; what came of it stays in the records."""
        shutil.rmtree(self.folder_of(trial), ignore_errors=True)

    def main_score(self, outcome: Outcome) -> float:
        """The main score of an outcome on the part that chooses; NaN if it failed."""
        return float("nan") if outcome.failed else self.row.find_main_score(outcome.validation)

    def load_base_skeleton(self) -> Any:
        """The base without its weights, on the meta device."""
        labels = self.data.source.labels if self.row.classifies else None
        return load_skeleton(self.task.model, task=self.row.name, labels=labels, quantize=self.task.quantize)

    def _check_fit(self, trial: Trial) -> None:
        method = METHODS[trial.method]
        if method.trains == "head" and not self.row.classifies:
            raise Unsupported(f"trains a new head, and {self.row.base_noun} has none.")
        if method.trains != "head" and not {*method.bases} & {*self.row.base_kinds}:
            raise Unsupported(f"not made for {self.row.base_noun}.")
        if self.task.quantize and method.trains == "model":
            raise Unsupported("cannot train weights in 8 or 4 bits.")
        # Packed weights are packed only where there are values, and some methods refuse them or do without.
        model = self.adapt(trial) if self.task.quantize else self.skeleton(trial)
        if isinstance(model, PeftModel):
            self.row.check_method(model)
        if self.train.gradient_checkpointing:
            enable_checkpointing(model)

    def _attach(self, base: Any, trial: Trial) -> nn.Module:
        method = METHODS[trial.method]
        config = method.make_config(base, trial.width)
        if config is not None:
            config = self.task.fit_method(config, base, self.data)
        return method.attach(base, narrow_sites(config, base, trial.blocks, trial.modules))

    def _copy_base(self, seed: int) -> Any:
        """The base as it was loaded after seeding with `seed`, with the generators as they were then."""
        if self._base is None or self._base[0] != seed:
            self._base = None  # one base at a time is held
            self.data  # noqa: B018 - loaded before the seed is set
            set_seed(seed)
            with redirect_stdout(io.StringIO()):
                base = self.task.base(self.data)
            self._base = seed, base, _RandomState()
        _, base, state = self._base
        if getattr(base, "is_quantized", False):  # packed weights do not survive a copy
            self._base = None
            return base
        state.restore()
        return copy.deepcopy(base)

    def _fit(self, model: nn.Module, trial: Trial, *, folder: str | None = None, validate: bool = True) -> FitResult:
        data, config = self.data, self.make_train_config(trial)
        if folder is not None:
            config = replace(config, output_dir=folder)
        with _quiet():
            return fit(
                model,
                data.train,
                data.validation if validate else None,
                config,
                metrics=data.metrics if validate else (),
                collate=data.collate,
                loss=data.loss,
                settings={**asdict(self.task), **asdict(trial), "split_seed": self.split_seed},
            )

    def wrap(self, trial: Trial, model: Any) -> TaskModel:
        """A trained model of `adapt`, as the functions of a task take an adapter."""
        wrapped = isinstance(model, PeftModel)
        base, method = (model.get_base_model(), model.active_peft_config) if wrapped else (model, None)
        return TaskModel(trial.key, model, self.row, self.data.processor, self.row.labels(base, method))

    def _score(self, trained: TaskModel) -> dict[str, float]:
        request = Request(
            split=self.parts.test_split, compare=False, resamples=1, training=self.parts.training
        )  # the interval of a comparison is over seeds
        found = self.row.evaluate(trained, self.task.dataset, request)
        return {name: score.value for name, score in found.scores.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of a run; the last one is printed where a signal ends it, as it says how to go on."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    except SystemExit:
        print(said.getvalue().rstrip().rpartition("\n")[2], file=sys.stderr)
        raise


class _RandomState:
    """The state of all global generators of random numbers when it was made."""

    def __init__(self) -> None:
        self.of_python, self.of_numpy, self.of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self.of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Put all generators back into that state."""
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)  # noqa: NPY002
        torch.set_rng_state(self.of_torch)
        if self.of_cuda:
            torch.cuda.set_rng_state_all(self.of_cuda)


def name_measured(*, test: bool, costs: bool, forgetting: bool) -> frozenset[str]:
    """The names of what is to be measured after the training."""
    asked = {"test": test, "costs": costs, "forgetting": forgetting}
    return frozenset(name for name, wanted in asked.items() if wanted)


def _explain(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return said if isinstance(error, InlayError) else f"{type(error).__name__}: {said}"
