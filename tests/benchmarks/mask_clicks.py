"""What a user's clicks are worth in images, one at a time, up to ten.

    python tests/benchmarks/mask_clicks.py [--base builtin:sam-tiny | --adapter FOLDER] [--images 16]

Up to 16 objects of each held-out image of `builtin:scenes`, and of crops of 96 pixels of the nuclei of the Data Science
Bowl 2018, are asked for by two users:

    centre    at first at the centre of the object, then each time at that of the largest error (`answer_centres`)
    random    at first anywhere in the object, then anywhere in what is wrong (`answer_clicks`)

The model gets the answer before with each click (`random`: half of the times). Scores are the mean IoU over objects,
and the share of objects whose mask after ten clicks is worse than after one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results"
DATA = {
    "builtin:scenes": ("builtin:scenes", None),
    "nuclei, crops of 96": (str(SHARED / "nuclei_dsb2018" / "dev"), 96),
}
COUNTS = (1, 3, 5, 10)


def load_rows(data, crop, images, processor):
    """Pixels (1, 3, S, S) and objects (1, P, S, S) of held-out images."""
    from inlay import load_masks
    from inlay.tasks.masks.view import scoring_view

    rows = load_masks(data).validation
    view = scoring_view(rows, processor, "point", crop=crop, meaning="instances")
    for i in range(min(images, len(view))):
        item = view[i]
        labels = item["labels"][item["labels"][:, 0, 0] >= 0]  # P s s, those that there are
        step = item["pixel_values"].shape[-1] // labels.shape[-1]
        objects = (labels > 0).repeat_interleave(step, 1).repeat_interleave(step, 2)
        if len(objects):
            yield item["pixel_values"][None], objects[None]


@torch.no_grad()
def score(model, rows):
    """IoU (10, N) of all objects after each click, for both users."""
    from inlay.tasks.masks.clicks import answer_clicks, measure_iou, score_centres

    found = {"centre": [], "random": []}
    for pixels, objects in rows:
        found["centre"].append(score_centres(model, pixels, objects, max(COUNTS)))
        answers = answer_clicks(model, model.get_image_embeddings(pixels), objects, [1] * max(COUNTS))
        found["random"].append(torch.stack([measure_iou(*answer) for answer in answers]))
    return {user: torch.cat(parts, 1) for user, parts in found.items()}


def table(rows):
    """Markdown."""
    lines = [
        f"| data | objects | clicks | {' | '.join(map(str, COUNTS))} | worse after 10 than after 1 |",
        f"|---|---:|---|{'---:|' * len(COUNTS)}---:|",
    ]
    for data, users in rows.items():
        for user, row in users.items():
            cells = " | ".join(f"{value:.3f}" for value in row["iou"])
            lines.append(f"| {data} | {row['objects']} | {user} | {cells} | {row['worse']:.1%} |")
    return "\n".join(lines) + "\n"


def main():
    """Both data sets, or one where there are no nuclei."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:sam-tiny")
    parser.add_argument("--adapter", help="Score this adapter instead of the base.")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", default="mask_clicks")
    args = parser.parse_args()
    from inlay import load_adapter, load_base, load_processor

    torch.set_num_threads(1)
    if args.adapter:
        adapter = load_adapter(args.adapter)
        model, processor = adapter.model, adapter.processor
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
    else:
        model, processor = load_base(args.base).eval(), load_processor(args.base)
    rows = {}
    for name, (data, crop) in DATA.items():
        if not data.startswith("builtin:") and not Path(data).is_dir():
            print(f"left out: there is no folder {data}")
            continue
        torch.manual_seed(0)
        rows[name] = {}
        for user, iou in score(model, load_rows(data, crop, args.images, processor)).items():
            means = [round(float(iou[count - 1].mean()), 4) for count in COUNTS]
            worse = round(float((iou[-1] < iou[0]).float().mean()), 4)
            rows[name][user] = {"iou": means, "worse": worse, "objects": iou.shape[1]}
    result = {"rows": rows, "counts": COUNTS, "model": args.adapter or args.base, "machine": describe_machine()}
    path = RESULTS / f"{args.out}.json"
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
