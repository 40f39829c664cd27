"""What a user's clicks, scribbles and lassos are worth on real MR scans, one at a time.

    python tests/benchmarks/hippocampus_clicks.py [--steps 240] [--seeds 0 1 2] [--split held_out|development]

Medical Segmentation Decathlon, hippocampus, the scans and the training of hippocampus.py. `held_out` trains on 48 scans
and scores 12 others; `development` trains on 36 of the 48 and scores the other 12 of them: settings were chosen there.
Adapters are kept in runs/hippocampus_clicks, and trained where they are not there.

A user prompts, with the reference's class, what is wrong in the mask that a VolumeSession gives:

    centre     clicks at the deepest voxel of the largest connected error (`clicks_at_centres`)
    densest    clicks in the densest 5x5x5 region of errors (`clicks_on_errors`)
    scribble   lines along the largest connected error, in its largest axial slice, of the class that most of it lacks
    lasso      contours of the class that is most wrong, in the axial slice with most errors

The session starts empty, or is given what `segment` found. Scores are mean Dice over scans and classes, and how many
scans have a lower Dice than `segment` without prompts, by any amount. Every voxel that was prompted must have the class
that was said of it last, or the benchmark ends with an error.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from hippocampus import CLASSES, CROP, RESULTS
from machine import describe_machine
from scan_folds import LABELS, train
from scipy import ndimage, sparse
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RUNS = Path(__file__).parents[2] / "runs" / "hippocampus_clicks"
STARTS = {"empty": "empty", "given": "given what `segment` found"}
PROMPTS = {
    "centre": "clicks at the centre of the largest error",
    "densest": "clicks where errors are densest",
    "scribble": "scribbles",
    "lasso": "lassos",
}
COUNTS = {"centre": (1, 3, 5, 10), "densest": (1, 3, 5, 10), "scribble": (1, 3), "lasso": (1, 3)}
NEIGHBOURS = np.ones((3, 3, 3))


def load_split(split):
    """Scans to train on, scans to score, and the processor; those held out are never in `development`."""
    from inlay.tasks.volumes.data import load_volumes
    from inlay.tasks.volumes.scan import VolumeProcessor

    data = load_volumes(str(SHARED / "hippocampus_msd04" / "dev"), labels=LABELS)
    processor = VolumeProcessor.fitted(data, CROP)
    if split == "held_out":
        return data.train, data.validation, processor
    cases = [data.train[i] for i in np.random.default_rng(7).permutation(len(data.train))]
    return [case for i, case in enumerate(cases) if i % 4], cases[::4], processor


def open_adapter(split, seed, steps):
    """Trained, or as it was trained before."""
    from inlay import load_adapter, save_adapter
    from inlay.tasks.volumes.view import VolumeView

    folder = RUNS / f"{split}_{seed}_{steps}" / "adapter"
    if not folder.is_dir():
        cases, _, processor = load_split(split)
        model, seconds = train("spatial", VolumeView(cases, processor, training=True), seed, steps)
        print(f"{folder.parent.name}: {seconds:.0f} CPU s to train", flush=True)
        save_adapter(model.eval(), folder, processor=processor)
    return load_adapter(folder)


def prompt_once(kind, session, mask, labels):
    """The mask after one more prompt, and the voxels (N, 3) and the class that were said; None: nothing is wrong."""
    from inlay.methods.spatial.prompts import clicks_at_centres, clicks_on_errors
    from inlay.tasks.volumes.strokes import fill_lasso, fill_scribble

    if not (mask != labels).any():
        return mask, None, 0
    if kind in ("centre", "densest"):
        simulate = clicks_at_centres if kind == "centre" else clicks_on_errors
        answer = F.one_hot(torch.from_numpy(mask.astype(np.int64)), CLASSES + 1).movedim(-1, 0)[None].float()
        point, label = simulate(answer, torch.from_numpy(labels)[None].long(), 1)
        place, label = point[0, 0].tolist(), label.item()
        return session.click(place, positive=label > 0, label=label or None), np.array([place], int), label
    if kind == "scribble":
        line, label = draw_scribble(mask, labels)
        return session.scribble(line, positive=label > 0, label=label or None), fill_scribble(line), label
    contour, z, label = draw_lasso(mask, labels)
    after = session.lasso(contour, axis=2, index=z, positive=label > 0, label=label or None)
    return after, fill_lasso(contour, 2, z), label


def draw_scribble(mask, labels):
    """A line (N, 3) and its class."""
    wrong = mask != labels
    largest = find_largest(wrong, NEIGHBOURS)
    label = int(np.bincount(labels[largest]).argmax())
    region = largest & (labels == label)
    z = int(region.sum((0, 1)).argmax())
    path = find_longest_path(find_largest(region[..., z], NEIGHBOURS[0]))
    return np.insert(path, 2, z, axis=1), label


def draw_lasso(mask, labels):
    """A contour (N, 2), its slice and its class; around what is too much, if the class is not in that slice."""
    wrong = mask != labels
    z = int(wrong.sum((0, 1)).argmax())
    found, true, bad = mask[..., z], labels[..., z], wrong[..., z]
    errors = [int((bad & ((found == k) | (true == k))).sum()) for k in range(1, CLASSES + 1)]
    label = int(np.argmax(errors)) + 1
    if (true == label).any():
        return trace_outline(find_largest(true == label, NEIGHBOURS[0])), z, label
    region = find_largest(bad & (found == label), NEIGHBOURS[0])
    label = int(np.bincount(true[region]).argmax())
    return trace_outline(find_largest(region & (true == label), NEIGHBOURS[0])), z, label


def find_largest(region, neighbours):
    """Its largest connected component."""
    names, _ = ndimage.label(region, neighbours)
    sizes = np.bincount(names.ravel())
    sizes[0] = 0
    return names == sizes.argmax()


def find_longest_path(region):
    """Pixels (N, 2) of the longest of all shortest paths in a connected region."""
    places = np.argwhere(region)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    graph = sparse.csr_matrix(np.where(apart < 1.5, apart, 0))
    lengths, before = sparse.csgraph.shortest_path(graph, return_predecessors=True)
    first, last = np.unravel_index(np.where(np.isfinite(lengths), lengths, -1).argmax(), lengths.shape)
    path = [last]
    while path[-1] != first:
        path.append(before[first, path[-1]])
    return places[path]


def trace_outline(region):
    """The longest closed line (N, 2) along the edges of a region's pixels."""
    padded, onward = np.pad(region, 1), {}
    sides = {
        (-1, 0): ((-0.5, -0.5), (-0.5, 0.5)), (0, 1): ((-0.5, 0.5), (0.5, 0.5)),
        (1, 0): ((0.5, 0.5), (0.5, -0.5)), (0, -1): ((0.5, -0.5), (-0.5, -0.5)),
    }  # fmt: skip
    for place in np.argwhere(padded):
        for step, (begin, end) in sides.items():
            if not padded[tuple(place + step)]:
                onward.setdefault(tuple(place - 1 + begin), []).append(tuple(place - 1 + end))
    lines = []
    while onward:
        line = [next(iter(onward))]
        while line[-1] in onward:
            following = onward[line[-1]].pop()
            if not onward[line[-1]]:
                del onward[line[-1]]
            line.append(following)
        lines.append(line[:-1])
    return np.array(max(lines, key=len))


def score_mask(mask, labels):
    """Mean Dice over the classes."""
    from inlay.tasks.volumes.scores import dice_of, overlap

    counts = overlap(torch.from_numpy(mask.astype(np.int16))[None], torch.from_numpy(labels)[None], CLASSES)
    return float(dice_of(counts.numpy()).mean())


def prompt_case(adapter, case, start, kind):
    """Dice before, and after each count of prompts."""
    from inlay import VolumeSession, segment

    scan = adapter.processor.read(case)
    labels = adapter.processor.back(scan.labels.numpy(), scan)
    begun = segment(adapter, scan, progress=False)
    session = VolumeSession(adapter, scan, mask=begun if start == "given" else None)
    mask, said, row = begun.mask, np.full(begun.mask.shape, -1), [score_mask(begun.mask, labels)]
    for count in range(1, max(COUNTS[kind]) + 1):
        mask, voxels, label = prompt_once(kind, session, mask, labels)
        if voxels is not None:
            said[tuple(voxels.T)] = label
        if (mask != said)[said >= 0].any():
            raise AssertionError(f"{case.name}: prompt {count} of {kind} was not obeyed")
        if count in COUNTS[kind]:
            row.append(score_mask(mask, labels))
    return row


def score(adapter, cases, seed, starts, kinds):
    """For each start and kind of prompt the Dice of each case before and after its counts of prompts."""
    torch.manual_seed(1000 + seed)
    return {
        f"{start} {kind}": [[round(dice, 4) for dice in prompt_case(adapter, case, start, kind)] for case in cases]
        for start in starts
        for kind in kinds
    }


def table(rows):
    """Markdown: the means over scans and seeds, and the scans that are worse than before."""
    counts = COUNTS["centre"]
    lines = [
        f"| session | prompts | none | {' | '.join(map(str, counts))} | worse after {', '.join(map(str, counts))} |",
        f"|---|---|---:|{'---:|' * len(counts)}---|",
    ]
    for name in next(iter(rows.values())):
        start, kind = name.split()
        dice = np.array([case for row in rows.values() for case in row[name]])  # N 1+counts
        means = dict(zip(COUNTS[kind], dice[:, 1:].mean(0), strict=True))
        cells = [f"{means[count]:.3f}" if count in means else "" for count in counts]
        worse = f"{', '.join(map(str, (dice[:, 1:] < dice[:, :1]).sum(0)))} of {len(dice)}"
        lines.append(f"| {STARTS[start]} | {PROMPTS[kind]} | {dice[:, 0].mean():.3f} | {' | '.join(cells)} | {worse} |")
    return "\n".join(lines) + "\n"


def main():
    """All seeds; results are written after each, and those that are there stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["held_out", "development"], default="held_out")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--train-only", action="store_true", help="Train what is not there yet, and score nothing.")
    parser.add_argument("--out", help="Name of the result file; default: hippocampus_clicks, of development with _dev.")
    args = parser.parse_args()
    if not (SHARED / "hippocampus_msd04" / "dev").is_dir():
        sys.exit(f"there are no scans at {SHARED}; see the Medical Segmentation Decathlon, task 4")
    torch.set_num_threads(1)
    name = args.out or ("hippocampus_clicks" if args.split == "held_out" else "hippocampus_clicks_dev")
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = before["rows"] if (before.get("split"), before.get("steps")) == (args.split, args.steps) else {}
    for seed in args.seeds:
        adapter = open_adapter(args.split, seed, args.steps)
        if args.train_only or str(seed) in rows:
            continue
        _, cases, _ = load_split(args.split)
        rows[str(seed)] = score(adapter, cases, seed, args.starts, args.prompts)
        result = {"rows": rows, "counts": COUNTS, "split": args.split, "steps": args.steps}
        result["machine"] = describe_machine("monai")
        path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
        path.with_suffix(".md").write_text(table(rows))
        print(table({str(seed): rows[str(seed)]}), flush=True)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
