"""All scans of a folder, segmented one after the other, with a record of what is done: the work can be taken up again.

The folder of masks holds a mask for each case, `volumes.csv` with a line for each, `probabilities/` if they are wanted,
and `segment.json`, which says by what each mask was made.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.files.atomic import replacing, write_json
from inlay.files.outputs import check_output_folder
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.data import Case
from inlay.tasks.volumes.dicom_seg import SEG, check_dicom_seg
from inlay.tasks.volumes.formats import case_name

if TYPE_CHECKING:
    from inlay.tasks.adapter import Adapter
    from inlay.tasks.volumes.segment import OpenScan, Segmentation

logger = logging.getLogger(__name__)

RECORD, VOLUMES, PROBABILITIES = "segment.json", "volumes.csv", "probabilities"


@dataclass(frozen=True)
class Job:
    """A case of the folder, and where its mask goes."""

    case: Case
    source: Path
    mask: Path
    probabilities: Path | None


@dataclass
class FolderWork:
    """What is to be done in a folder of masks, and what is done.

    Attributes:
        out: The folder of masks.
        made_by: The adapters and options that decide what masks hold, by name, as JSON takes them.
        jobs: All cases.
        overwrite: Masks that are there and are not those of this run are replaced.
        scans: By case what is known of its mask, as in `segment.json`.
        failed: By case what was wrong with its scan.
    """

    out: Path
    made_by: dict[str, Any]
    jobs: list[Job]
    overwrite: bool = False
    scans: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _origins: dict[str, dict[str, Any]] = field(default_factory=dict)  # adapters and options by their digest

    @classmethod
    def plan(
        cls,
        cases: Sequence[Case],
        out: str | Path,
        made_by: Mapping[str, Any],
        *,
        suffix: str | None = None,
        probabilities: bool = False,
        overwrite: bool = False,
    ) -> FolderWork:
        """What is to be done, once the masks that are there have been looked at.

        Args:
            cases: From `find_scans`.
            out: The folder of masks, which is made if it is not there.
            made_by: The adapters and options that decide what masks hold, by name.
            suffix: Of the masks, such as .nii.gz; None: that of each scan, or .nii.gz.
            probabilities: Also save them.
            overwrite: Replace masks that are there and are not those of this run.

        Raises:
            InlayError: A folder that cannot be written, or that holds masks of something else; a suffix that no mask
                has.
        """
        from inlay.tasks.volumes.segment import MASKS

        out = check_output_folder(out)
        if suffix is not None and suffix not in MASKS:
            raise BadInput(f"unknown format {suffix[1:]!r}; choose one of {', '.join(each[1:] for each in MASKS)}.")
        jobs = []
        for case in cases:
            source = case.files[0]
            own = source.name[len(case_name(source)) :].lower()
            if suffix in SEG:
                check_dicom_seg(out / f"{case.name}{suffix}", source)
            mask = out / f"{case.name}{suffix or (own if own in MASKS else '.nii.gz')}"
            jobs.append(Job(case, source, mask, out / PROBABILITIES / f"{case.name}.nii.gz" if probabilities else None))
        if any(job.source.resolve().parent == out.resolve() for job in jobs):
            raise BadInput(f"'{out}' is the folder of the scans; give another one for the masks.")
        work = cls(out, dict(made_by), jobs, overwrite)
        work._read_record()
        work._refuse_others()
        return work

    @property
    def pending(self) -> list[Job]:
        """Cases that lack a mask, or probabilities, of this run's adapters and options."""
        return [job for job in self.jobs if not self._is_done(job)]

    def run(
        self,
        adapters: Sequence[Adapter],
        *,
        overlap: float = 0.5,
        flips: bool = False,
        largest: bool = False,
        batch_size: int = 1,
    ) -> None:
        """Segment what is pending: a scan that cannot be segmented is noted, and the next one is taken.

        The next scan is read while the model answers for this one.

        Args:
            adapters: One, or those of an ensemble.
            overlap: As for `segment`, as the others.
            flips: Average over mirrored windows.
            largest: Keep only the largest component of each class.
            batch_size: Windows in one forward pass.

        Raises:
            InlayError: What `segment` refuses whatever the scan.
        """
        import torch
        from tqdm.auto import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        from inlay.tasks.volumes.segment import check_settings, segment

        check_settings(adapters, overlap=overlap, flips=flips, batch_size=batch_size)
        answer = partial(
            segment, adapters[0], ensemble=adapters[1:], overlap=overlap, flips=flips, largest=largest,
            batch_size=batch_size,
        )  # fmt: skip
        channels, pending = len(adapters[0].labels) + 1, self.pending
        wants_probabilities = any(job.probabilities for job in pending)
        (self.out / PROBABILITIES if wants_probabilities else self.out).mkdir(parents=True, exist_ok=True)
        self._write_record()
        bar = tqdm(total=len(self.jobs), initial=len(self.jobs) - len(pending), desc="scans", unit="scan", disable=None)
        with bar, logging_redirect_tqdm():
            for job, scan in _read_ahead(pending, adapters[0]):
                try:
                    self._make_mask(job, scan(), answer, channels, np.float32 if adapters[1:] else np.float16)
                except (InlayError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                    self.failed[job.case.name] = _explain(error)
                    logger.warning("%s: %s", job.case.name, self.failed[job.case.name])
                self._write_record()
                bar.update()

    def _make_mask(
        self, job: Job, scan: OpenScan, answer: Callable[..., Segmentation], channels: int, kind: type[np.floating]
    ) -> None:
        """Segment a scan, and save what is wanted of it; nothing is noted before all is on disk."""
        from inlay.tasks.volumes.segment import make_scratch

        kept = False if job.probabilities is None else make_scratch((channels, *scan.scan.own_shape), kind)
        stamp = _stamp(job.case.files)  # before: a scan that changes meanwhile is noticed
        found = answer(scan, keep_probabilities=kept)
        if job.probabilities is not None:
            found.save_probabilities(job.probabilities)
        if not self._has_mask(job):  # one that lacks its probabilities only stays as it is
            found.save(job.mask)
            self._remove_older(job)
        self.scans[job.case.name] = {
            "scan": str(job.source),
            "version": stamp,
            "mask": job.mask.name,
            "made_by": self._digest,
            "volumes_ml": found.volumes_ml,
        }

    def _remove_older(self, job: Job) -> None:
        """Remove the mask that this one replaces, if it has another suffix: a case has one mask."""
        known = self.scans.get(job.case.name)
        if known is not None and known["mask"] != job.mask.name and self._explain_other(job, known) is not None:
            (self.out / known["mask"]).unlink(missing_ok=True)

    @property
    def _digest(self) -> str:
        """Of this run's adapters and options."""
        return hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()[:16]

    def _has_mask(self, job: Job) -> bool:
        known = self.scans.get(job.case.name)
        return known is not None and job.mask.is_file() and self._explain_other(job, known) is None

    def _is_done(self, job: Job) -> bool:
        return self._has_mask(job) and (job.probabilities is None or job.probabilities.is_file())

    def _explain_other(self, job: Job, known: Mapping[str, Any]) -> str | None:
        """How what made a mask differs from this run; None: in nothing."""
        before = self._origins.get(known["made_by"], {})
        changed = [name for name in {**before, **self.made_by} if before.get(name) != self.made_by.get(name)]
        if changed:
            name = changed[0]
            return f"{name} was {_tell(before.get(name))}, and is {_tell(self.made_by.get(name))}"
        if job.source.exists() and known["version"] != _stamp(job.case.files):
            return "its scan has changed since"
        return None

    def _refuse_others(self) -> None:
        """Raise InlayError for masks that are there and are not those of this run, unless they may be replaced."""
        others = {}
        for job in self.jobs:
            known = self.scans.get(job.case.name)
            there = [job.mask, *([] if known is None else [self.out / known["mask"]])]
            path = next((path for path in there if path.exists()), None)
            if path is not None:
                why = "not made by this command" if known is None else self._explain_other(job, known)
                if why is not None:
                    others[path.name] = why
        if others and not self.overwrite:
            told = list_first([f"{name} ({why})" for name, why in others.items()])
            raise BadInput(
                f"'{self.out}' holds {len(others)} of the masks already, and not as this run would make them: {told}. "
                "Give another folder, or pass --overwrite to make them again."
            )

    def _read_record(self) -> None:
        path = self.out / RECORD
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._origins, self.scans = dict(content["made_by"]), dict(content["scans"])
            for known in self.scans.values():
                if not {"version", "mask", "made_by", "volumes_ml"} <= known.keys():
                    raise KeyError("scans")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(
                f"'{path}' is no record of segmented scans ({type(error).__name__}); give another folder, or remove it."
            ) from error

    def _write_record(self) -> None:
        """Write `segment.json`, and `volumes.csv`: a line a case, a column a class in ml, and what is wrong with it."""
        self._origins[self._digest] = self.made_by
        used = {self._digest, *(known["made_by"] for known in self.scans.values())}
        origins = {digest: origin for digest, origin in self._origins.items() if digest in used}
        write_json(self.out / RECORD, {"made_by": origins, "scans": self.scans, "failed": self.failed})
        labels = list(dict.fromkeys(label for known in self.scans.values() for label in known["volumes_ml"]))
        with replacing(self.out / VOLUMES) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", *(f"{label}_ml" for label in labels), "error"])
            for name in sorted({*self.scans, *self.failed}):
                volumes = self.scans.get(name, {}).get("volumes_ml", {})
                cells = [f"{volumes[label]:.6g}" if label in volumes else "" for label in labels]
                writer.writerow([name, *cells, self.failed.get(name, "")])


def _read_ahead(jobs: Sequence[Job], adapter: Adapter) -> Iterator[tuple[Job, Callable[[], OpenScan]]]:
    """Each job, and what gives its scan or raises what reading it has raised; the next one is being read meanwhile."""
    from inlay.tasks.volumes.segment import open_scan

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[OpenScan] | None = None
        for i, job in enumerate(jobs):
            current = waiting or pool.submit(open_scan, adapter, _source_of(job))
            waiting = pool.submit(open_scan, adapter, _source_of(jobs[i + 1])) if i + 1 < len(jobs) else None
            yield job, current.result


def _source_of(job: Job) -> Path | tuple[Path, ...]:
    """The file of a case, or those of its channels in their order."""
    files = job.case.files
    return files if len(files) > 1 else files[0]


def _stamp(paths: Sequence[Path]) -> list[int]:
    """Size and time of the last change of files, or of all in folders: alike if they are as before."""
    files = [file.stat() for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)]


def _tell(value: Any) -> str:
    return list_first(value) if isinstance(value, list) else str(value)


def _explain(error: BaseException) -> str:
    """One sentence for what went wrong with a scan."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}."
    if isinstance(error, InlayError):
        return str(error)
    said = str(error).splitlines()[0] if str(error) else "out of memory"
    return f"there is not enough memory for this scan ({said})."
