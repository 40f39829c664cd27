"""The folder of a run: settings, loss curve, checkpoint, best weights and result.

    run.json        the settings that decide the weights; the run is resumed only with the same ones
    log.jsonl       one line per step (loss, learning rate, gradient norm) and one per evaluation
    last/           the state to resume from: trainable weights, optimiser, schedule, scaler, progress
    best/           trainable weights of the best evaluation
    finished.json   the result; the run is complete if this file exists

    prior/, samples/, sheet.png     what a callback has painted, to train on and on the way

None of them contains the frozen base.
"""

import json
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from inlay.errors import BadInput, DamagedFile
from inlay.files.atomic import PENDING_FILE, lock_folder, pending_folder, recover, replacing, write_json, writing
from inlay.train.config import TrainConfig
from inlay.train.sharding import WholeStates, find_shape, gather_whole, named_parameters, set_whole

WEIGHTS = "trainable.safetensors"
# in the order in which they are deleted
_RUN_FILES = ("finished.json", "last", "best", "log.jsonl", "logs", "prior", "samples", "sheet.png", "run.json")


@dataclass
class Progress:
    """The progress of a run, stored with every checkpoint."""

    step: int = 0
    accumulate: int = 1
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # of the steps since the last evaluation
    loss_count: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the best evaluation
    history: list[dict[str, float]] = field(default_factory=list)  # one row per evaluation
    seconds: float = 0.0
    stream: list[dict[str, Any]] = field(default_factory=list)  # where each process reads on, if the data is streamed


# The data workers of a killed run hold its lock until they notice that the run has ended.
_WORKERS_END_S = 15


@contextmanager
def open_run(
    config: TrainConfig, model: nn.Module, accelerator: Accelerator, settings: dict[str, Any]
) -> Iterator["Run"]:
    """Open the run in `config.output_dir`, which no other process can train meanwhile.

    Raises:
        BadInput: Another process trains this run, the folder holds other files or a run with other settings, or it is
            on a disk that a machine of the run does not share.
    """
    with lock_folder(config.output_dir, wait_s=_WORKERS_END_S) if accelerator.is_main_process else nullcontext():
        _check_shared_disk(Path(config.output_dir), accelerator)
        run = Run(config, model, accelerator, settings)
        try:
            yield run
        finally:
            run.close_log()


# A network disk may show a new file to another machine only after some seconds.
_FILE_SEEN_S = 10


def _check_shared_disk(folder: Path, accelerator: Accelerator) -> None:
    """Look on every machine for a file that the main process has written next to the run folder.

    Raises:
        BadInput: A machine does not see it. All of them read the checkpoint and the best weights, which one writes.
    """
    if sum(gather_object([accelerator.is_local_main_process])) < 2:
        return
    parent = folder.resolve().parent
    probe = parent / broadcast_object_list([f"{PENDING_FILE}{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    until = time.monotonic() + _FILE_SEEN_S
    while not (seen := probe.is_file()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = sorted(set(gather_object([] if seen else [platform.node()])))
    if accelerator.is_main_process:
        probe.unlink()
    if blind:
        raise BadInput(
            f"{', '.join(blind)} cannot see the files that the main process writes to {parent}; choose an --output_dir "
            "on a disk that all machines share."
        )


class Run:
    """A run folder, opened for training by `open_run`. Only the main process writes to it."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, accelerator: Accelerator, settings: dict[str, Any]
    ) -> None:
        self.folder = Path(config.output_dir)
        self.model, self.accelerator = model, accelerator
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.progress = Progress(accumulate=config.accumulate)
        self.result: dict[str, Any] | None = None
        self._log: TextIO | None = None  # log.jsonl
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        if accelerator.is_main_process:
            self._open_folder(config, settings)
        accelerator.wait_for_everyone()
        if (self.folder / "finished.json").is_file():
            self.result = json.loads((self.folder / "finished.json").read_text(encoding="utf-8"))

    def _open_folder(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        """Create the folder, or check that it holds this run."""
        path = self.folder / "run.json"
        identity = {**config.identity(), "precision": self.accelerator.mixed_precision, **settings}
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(f"output_dir must be a folder, but {self.folder} is a file.")
        present = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        if not path.is_file() and not all(name.startswith(PENDING_FILE) for name in present):
            raise BadInput(f"{self.folder} holds other files, not a run of inlay; choose another --output_dir.")
        if path.is_file() and config.overwrite:
            self._delete_run()
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DamagedFile(f"{path} is not readable as JSON ({error}); start again with --overwrite.") from None
            now = json.loads(json.dumps(identity))
            # A setting that an earlier version did not have was at its default then: that of TrainConfig, or else off.
            stored = {key: value for key, value in now.items() if not value} | TrainConfig().identity() | stored
            differing = [key for key in stored | now if stored.get(key) != now.get(key)]
            if differing:
                changes = ", ".join(f"{k} {stored.get(k)!r} -> {identity.get(k)!r}" for k in sorted(differing))
                raise BadInput(
                    f"{self.folder} holds a run with other settings ({changes}); choose another --output_dir, or "
                    "delete the run with --overwrite."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("last", "best"):
            recover(self.folder / name)
        for unfinished in self.folder.glob(f"{PENDING_FILE}*"):  # files of a killed run
            unfinished.unlink()
        if not path.is_file():
            write_json(path, identity)

    def _delete_run(self) -> None:
        """Delete the files of the run and nothing else; if this is interrupted, a run without a checkpoint is left."""
        (self.folder / "finished.json").unlink(missing_ok=True)
        (self.folder / "last" / "progress.json").unlink(missing_ok=True)
        for path in (self.folder / name for name in _RUN_FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def resume(self, model: nn.Module, optimizer: Any, scheduler: Any) -> bool:
        """Load the last checkpoint into what will be trained; False if there is none.

        Args:
            model: The model, or its twin whose weights are shards.
            optimizer: As accelerate has prepared it.
            scheduler: Of the learning rate.
        """
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        last = self.folder / "last"
        if not (last / "progress.json").is_file():
            self._truncate_log()
            return False
        if self.accelerator.is_fsdp2:
            self._load_shards(last)
        else:
            self.accelerator.load_state(str(last), load_module_strict=False)  # which DeepSpeed reads
        self.progress = Progress(**json.loads((last / "progress.json").read_text(encoding="utf-8")))
        self._truncate_log()
        return True

    def save_checkpoint(self) -> None:
        """Write `last/`. All processes take part; the main one renames the folder at the end."""
        with _CollectiveWrite(self.accelerator, self.folder / "last") as folder:
            if self.accelerator.is_fsdp2:
                self._save_shards(folder)
            else:
                self.accelerator.save_state(str(folder), exclude_frozen_parameters=True)  # which DeepSpeed reads
            if self.accelerator.is_main_process:
                write_json(folder / "progress.json", asdict(self.progress))

    def save_best(self) -> None:
        """Write the present weights to `best/`. All processes take part."""
        weights = self._gather_trainable()
        if self.accelerator.is_main_process:
            with writing(self.folder / "best") as folder:
                save_file(weights, folder / WEIGHTS)
        self.accelerator.wait_for_everyone()

    def load_best(self) -> None:
        """Load the weights of the best evaluation into the model."""
        path = self.folder / "best" / WEIGHTS
        if not path.is_file():
            raise DamagedFile(f"{path} is missing: the weights of this run are gone; train again with --overwrite.")
        self._set_weights(load_file(path))

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the run as complete, and delete the state to resume from."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "finished.json", result)
            shutil.rmtree(self.folder / "last", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def log(self, row: dict[str, float]) -> None:
        """Append one line to log.jsonl."""
        if self.accelerator.is_main_process:
            if self._log is None:  # it stays open: a small step takes little longer than opening it
                self._log = (self.folder / "log.jsonl").open("a", buffering=1, encoding="utf-8")
            self._log.write(json.dumps(row) + "\n")

    def close_log(self) -> None:
        """Close log.jsonl, where it is open."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _truncate_log(self) -> None:
        """Remove the lines after the checkpoint from the log, as those steps are taken again."""
        path = self.folder / "log.jsonl"
        if self.accelerator.is_main_process and path.is_file():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the run was killed while it wrote this line
                    continue
                if row["step"] <= self.progress.step:
                    kept.append(line)
            with replacing(path) as shorter:
                shorter.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _gather_trainable(self) -> dict[str, torch.Tensor]:
        """The whole trainable weights, in all processes."""
        parameters = named_parameters(self.model)
        return {name: gather_whole(parameters[name]).contiguous() for name in self.names}

    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = named_parameters(self.model)
        if weights.keys() != set(self.names) or any(weights[n].shape != find_shape(parameters[n]) for n in weights):
            raise BadInput(f"the checkpoint in {self.folder} is of another model; choose another --output_dir.")
        for name in self.names:
            set_whole(parameters[name], weights[name])

    def _save_weights(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if weights:  # empty under DeepSpeed, which writes its own shards
            weights.clear()
            if self.accelerator.is_main_process:
                save_file(self._gather_trainable(), Path(folder) / WEIGHTS)

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        if models:
            models.clear()
            self._set_weights(load_file(Path(folder) / WEIGHTS))

    def _save_shards(self, folder: Path) -> None:
        """Write what an unsharded run writes; accelerate would store the shards of all weights, frozen ones too."""
        weights = self._gather_trainable()
        if self.accelerator.is_main_process:
            save_file(weights, folder / WEIGHTS)
        save_accelerator_state(
            str(folder),
            model_states=[],
            optimizers=[WholeStates(self.optimizer)],
            schedulers=[self.scheduler],
            dataloaders=[],
            process_index=self.accelerator.process_index,
            step=0,
            scaler=self.accelerator.scaler,
        )

    def _load_shards(self, folder: Path) -> None:
        self._set_weights(load_file(folder / WEIGHTS))
        load_accelerator_state(
            str(folder),
            models=[],
            optimizers=[WholeStates(self.optimizer)],
            schedulers=[self.scheduler],
            dataloaders=[],
            process_index=self.accelerator.process_index,
            scaler=self.accelerator.scaler,
        )


class _CollectiveWrite:
    """Write one folder from all processes: `writing` on the main process, the same pending folder on the others.

    All processes wait for each other on entry and on exit.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.inner = writing(folder) if accelerator.is_main_process else None

    def __enter__(self) -> Path:
        folder = self.inner.__enter__() if self.inner else pending_folder(self.folder)
        self.accelerator.wait_for_everyone()
        return folder

    def __exit__(self, *error: Any) -> None:
        self.accelerator.wait_for_everyone()
        if self.inner:
            self.inner.__exit__(*error)
        self.accelerator.wait_for_everyone()
