"""A dog and a toy, learned apart and added: what is in the images of the sum, by rule and over the weights.

    python tests/benchmarks/dog_toy.py                           # trains both first; 15 minutes on a quiet core
    python tests/benchmarks/dog_toy.py --dog FOLDER --toy FOLDER # of adapters that are there

Two LoRAs of builtin:paint-tiny, each trained on the six images of an embedded subject, are combined at equal weights
by each rule. From each of 64 seeds are painted: the dog, the toy, both together, each on one of six backgrounds, and a
prompt that names neither. Given are, with 95 % intervals over the seeds:

- dog, toy, both: the share of the images that ask for both in which the judge (builtin:paint-judge) finds the subject
  (Wilson's interval);
- fidelity: the mean cosine of images that ask for one subject with its own six, by the judge's features;
- background: the share of images that ask for both whose background the judge finds;
- prompt: the share of background, shape and colour of the prompts that name neither subject that the judge finds;
- drift: 1 - cosine, and mean absolute difference of pixels (0 to 1), of these images and those of the base.

Then the two are painted next to each other in regions of one image (inlay paint), each by its own adapter; and, to tell
what the regions do from what the adapters do, by the combined ones in both regions, with a prompt for each region or
the same for both. Their overlap was chosen on the seeds above; they are scored on 64 others.

Everything is stored as soon as it is there; the same command goes on.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from PIL import Image

from inlay import Bank, Region, combine, draw_paintings, load_adapter, load_base, paint_regions, read_adapter
from inlay.builtin.paintings import BACKGROUNDS
from inlay.files.atomic import write_json
from inlay.tasks.canvas import GRID, INK, MUTED, Canvas, Line, Point, Text
from inlay.tasks.statistics import score_with_intervals
from inlay.tasks.text_to_image.data import load_captioned, open_captioned
from inlay.tasks.text_to_image.encoder import load_encoder
from inlay.tasks.text_to_image.evaluate import UNRELATED
from inlay.tasks.text_to_image.judge import JUDGE, JUDGED, find_subjects, score_prompts
from inlay.tasks.text_to_image.paint import Sampling, paint_pairs
from inlay.tasks.text_to_image.scores import (
    Values,
    compare_own_images,
    compare_with_subject,
    measure_feature_drift,
    measure_pixel_drift,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, ASSETS = HERE / "results" / "dog_toy", ROOT / "docs" / "assets"
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25)
RULES = ("add", "ties", "zip")  # over the weights; average divides by their sum, so that it has one point
SUBJECTS = ("dog", "toy")
NAMES = {"dog": "sks dog", "toy": "zwx toy"}  # as the embedded data calls them
PLACES = {"night": "at night"} | {name: f"on {name}" for name in BACKGROUNDS if name != "night"}
SHOWN = 4  # images of each point that stand in the sheets
COLUMNS = {
    "dog": "dog",
    "toy": "toy",
    "both": "both",
    "fidelity_dog": "fidelity dog",
    "fidelity_toy": "fidelity toy",
    "background": "background",
    "prompt": "prompt",
    "drift_features": "drift, features",
    "drift_pixels": "drift, pixels",
}
PRESENCE = ("dog", "toy", "both")
COLOURS = {"dog": "#d55e00", "toy": "#0072b2", "both": "#1b1b1f"}  # after Okabe & Ito 2008


def name_prompts(what: str, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """A prompt for each seed, over the backgrounds."""
    return [(f"a photo of {what} {PLACES[BACKGROUNDS[seed % len(BACKGROUNDS)]]}", seed) for seed in seeds]


class Bench:
    """Paints and measures one adapter after the other.

    Attributes:
        seeds: Of the images.
        sampling: How they are painted.
        work: Folder of adapters and images.
    """

    def __init__(self, base: str, seeds: Sequence[int], sampling: Sampling, work: Path) -> None:
        self.base, self.seeds, self.sampling, self.work = base, list(seeds), sampling, work
        self.encoder = load_encoder(JUDGE if base == JUDGED else "builtin:vit-tiny", "cpu")
        rows = {name: load_captioned(f"builtin:{name}").train for name in SUBJECTS}
        self.own = {name: self.encoder.encode_images([open_captioned(row) for row in rows[name]]) for name in SUBJECTS}
        self.asked = {name: name_prompts(NAMES[name], seeds) for name in SUBJECTS}
        self.asked["both"] = name_prompts(f"{NAMES['dog']} and {NAMES['toy']}", seeds)
        self.asked["other"] = [(UNRELATED[seed % len(UNRELATED)], seed) for seed in seeds]
        self._others: list[Image.Image] = []

    def measure(self, key: str, adapter: Any) -> dict[str, dict[str, float]]:
        """All scores of one point, and its first images in the work folder."""
        images = {kind: paint_pairs(adapter, pairs, self.sampling) for kind, pairs in self.asked.items()}
        for kind, found in images.items():
            (self.work / "images" / key).mkdir(parents=True, exist_ok=True)
            for seed, image in zip(self.seeds[:SHOWN], found, strict=False):
                image.save(self.work / "images" / key / f"{kind}_{seed}.png")
        self._others = self._others or (images["other"] if key == "base" else self.read_others())
        if key == "base":
            for seed, image in zip(self.seeds, images["other"], strict=True):
                image.save(self.work / "images" / key / f"other_{seed}.png")
        features = {kind: self.encoder.encode_images(found) for kind, found in images.items()}
        base = self.encoder.encode_images(self._others)
        both = find_subjects(images["both"])
        values = {
            **{f"fidelity_{name}": compare_with_subject(features[name], self.own[name]) for name in SUBJECTS},
            "background": score_prompts(images["both"], [prompt for prompt, _ in self.asked["both"]]),
            "prompt": score_prompts(images["other"], [prompt for prompt, _ in self.asked["other"]]),
            "drift_features": measure_feature_drift(features["other"], base),
            "drift_pixels": measure_pixel_drift(images["other"], self._others),
        }
        shares = {**both, "both": both["dog"] * both["toy"]}
        return {**{name: find_share(found) for name, found in shares.items()}, **find_means(values)}

    def read_others(self) -> list[Image.Image]:
        """What the base painted of the prompts that name neither subject."""
        paths = [self.work / "images" / "base" / f"other_{seed}.png" for seed in self.seeds]
        return [Image.open(path).convert("RGB") for path in paths]


def find_share(found: Values) -> dict[str, float]:
    """A share and its interval. Source: Wilson 1927."""
    n, p, z = len(found), float(found.mean()), 1.96
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    half /= 1 + z * z / n
    return {"value": round(p, 4), "low": round(max(0.0, centre - half), 4), "high": round(min(1.0, centre + half), 4)}


def find_means(values: dict[str, Values]) -> dict[str, dict[str, float]]:
    """Means and bootstrap intervals over the seeds."""
    count = len(next(iter(values.values())))
    scores = score_with_intervals(
        lambda rows: {name: float(found[rows].mean()) for name, found in values.items()}, count
    )
    return {
        name: {key: round(float(value), 4) + 0.0 for key, value in vars(score).items() if value is not None}
        for name, score in scores.items()
    }


def train(subject: str, work: Path, options: Sequence[str]) -> Path:
    """The adapter of one subject, by the recipe; it goes on where it was stopped."""
    folder = work / "train" / subject / "adapter"
    if not folder.is_dir():
        command = [sys.executable, str(ROOT / "recipes" / "dreambooth_lora.py"), "--dataset", f"builtin:{subject}"]
        subprocess.run([*command, "--output_dir", str(folder.parent), *options], check=True)
    return folder


def list_points(folders: dict[str, Path]) -> list[tuple[str, str, float, dict[Path, float] | Path | None]]:
    """Key, rule, weight and what is to be loaded: nothing, a folder, or adapters to combine."""
    points: list[tuple[str, str, float, dict[Path, float] | Path | None]] = [("base", "base", 0.0, None)]
    points += [(f"{name} only", f"{name} only", 1.0, folders[name]) for name in SUBJECTS]
    points.append(("average 1", "average", 1.0, dict.fromkeys(folders.values(), 1.0)))
    for weight in (1.0, *(w for w in WEIGHTS if w != 1.0)):  # the most asked for first
        for rule in RULES:
            points.append((f"{rule} {weight:g}", rule, weight, dict.fromkeys(folders.values(), weight)))
    return points


def load_point(bench: Bench, key: str, rule: str, what: dict[Path, float] | Path | None) -> Any:
    """The base or an adapter, combined where it is not there yet."""
    if what is None:
        return load_base(bench.base)
    folder = combine_once(bench, key, rule, what) if isinstance(what, dict) else what
    return load_adapter(folder, bench.base, device="cpu")


def combine_once(bench: Bench, key: str, rule: str, weights: dict[Path, float]) -> Path:
    """The folder of a combination, made where it is not there yet."""
    digests = "-".join(read_adapter(folder).digest[:8] for folder in weights)
    out = bench.work / "combined" / digests / key.replace(" ", "_")
    if not out.is_dir():
        combine(weights, rule, out=out)
    return out


def write_table(points: dict[str, Any]) -> str:
    """A row for each point: by rule, then by weight."""
    order = ["base", *(f"{name} only" for name in SUBJECTS), "average", *RULES]
    rows = sorted(points.values(), key=lambda point: (order.index(point["rule"]), point["weight"]))
    lines = ["| rule | weight | " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row in rows:
        cells = [format_score(row["scores"][name], name in PRESENCE) for name in COLUMNS]
        weight = "" if row["rule"] == "base" else f"{row['weight']:g}"
        lines.append(f"| {row['rule']} | {weight} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_score(score: dict[str, float], share: bool) -> str:
    """The value and its interval; shares in per cent."""
    if share:
        return f"{score['value']:.0%} ({score['low']:.0%} to {score['high']:.0%})"
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def tell_losses(points: dict[str, Any]) -> list[str]:
    """Of each rule the weight at which both are there most often, and where one subject is lost.

    A subject is lost where the upper end of its interval is below a half.
    """
    told = []
    for rule in (*RULES, "average"):
        rows = sorted((p for p in points.values() if p["rule"] == rule), key=lambda point: point["weight"])
        if not rows:
            continue
        best = max(rows, key=lambda point: point["scores"]["both"]["value"])
        share = f"{format_score(best['scores']['both'], True)} of the images"
        said = f"`{rule}` has both most often at weight {best['weight']:g}: {share}."
        if best["scores"]["both"]["value"] == 0:
            said = f"`{rule}` has both at no weight: {share}."
        for name in SUBJECTS:
            lost = [f"{p['weight']:g}" for p in rows if p["scores"][name]["high"] < 0.5]
            said += f" The {name} is lost at weight {', '.join(lost)}." if lost else ""
        told.append(f"- {said}")
    return told


def draw_presence(points: dict[str, Any]) -> Image.Image:
    """For each rule the share of images with the dog, the toy and both, over the weight."""
    shown = [rule for rule in RULES if any(point["rule"] == rule for point in points.values())]
    width, height, left, top, bottom, panel = 80 + 420 * len(shown), 520, 80, 110, 440, 370
    canvas = Canvas(width, height, "Presence of dog, toy and both over the weight of the adapters")
    canvas.add(
        Text((24, 32), 'Prompt "sks dog and zwx toy": share of images in which the judge finds them', 22, bold=True)
    )
    x = 24.0
    for name, colour in COLOURS.items():
        canvas.add(Line([(x, 68), (x + 28, 68)], colour, 4), Text((x + 36, 68), name, 18, MUTED))
        x += 110
    span = WEIGHTS[-1]

    def place(rule: str, weight: float, share: float) -> Point:
        return left + shown.index(rule) * 420 + weight / span * panel, bottom - share * (bottom - top)

    for rule in shown:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            canvas.add(Line([place(rule, 0, share), place(rule, span, share)], GRID, 1.5))
            start = place(rule, 0, share)
            canvas.add(Text((start[0] - 8, start[1]), f"{share:.0%}", 15, INK, "end"))
        for weight in (0.0, *WEIGHTS):
            canvas.add(Text((place(rule, weight, 0)[0], bottom + 20), f"{weight:g}", 15, INK, "middle"))
        canvas.add(Text((place(rule, span / 2, 0)[0], bottom + 48), f"weight of each, {rule}", 17, INK, "middle"))
        rows = [points["base"], *(p for p in points.values() if p["rule"] == rule)]
        rows.sort(key=lambda point: point["weight"])
        for shift, name in zip((-3, 3, 0), PRESENCE, strict=True):  # so that bars do not hide each other
            scores = [(row["weight"], row["scores"][name]) for row in rows]
            line = [(x + shift, y) for x, y in (place(rule, w, score["value"]) for w, score in scores)]
            canvas.add(Line(line, COLOURS[name], 3))
            for (x, _), (weight, score) in zip(line, scores, strict=True):
                ends = [place(rule, weight, score[end])[1] for end in ("low", "high")]
                canvas.add(Line([(x, ends[0]), (x, ends[1])], COLOURS[name], 1.5))
    return canvas.to_image()


def draw_region_sheet(regions: dict[str, Any], work: Path) -> None:
    """The first images of each way to paint two regions."""
    rows = []
    for key in regions:
        files = [work / "images" / "regions" / f"{key.replace(' ', '_')}_{i}.png" for i in range(SHOWN)]
        rows.append([Image.open(file).convert("RGB") for file in files])
    draw_paintings(rows, list(regions), ASSETS / "dog_toy_regions.png", side=200)


def draw_sheets(points: dict[str, Any], work: Path) -> None:
    """One sheet of the subjects by their own adapters, and one of the sums over the weights."""

    def read(key: str, kind: str, seed: int) -> Image.Image:
        with Image.open(work / "images" / key / f"{kind}_{seed}.png") as image:
            return image.convert("RGB")

    seeds = range(SHOWN)
    captions = {**NAMES, "both": " and ".join(NAMES.values())}
    rows, said = [], []
    for key in ("base", *(f"{name} only" for name in SUBJECTS), "add 1"):
        for kind in (*SUBJECTS, "both"):
            if key in points and not (key.endswith("only") and kind not in key):
                rows.append([read(key, kind, seed) for seed in seeds])
                said.append(f"{key}: a photo of {captions[kind]}, each on another background")
    draw_paintings(rows, said, ASSETS / "dog_toy_subjects.png", columns=[f"seed {seed}" for seed in seeds], side=128)
    rows, said = [], []
    for rule in RULES:
        weights = [weight for weight in WEIGHTS if f"{rule} {weight:g}" in points]
        for seed in seeds[:2] if weights else ():
            rows.append([read("base", "both", seed), *(read(f"{rule} {w:g}", "both", seed) for w in weights)])
            said.append(f"{rule}: {name_prompts(captions['both'], [seed])[0][0]}, seed {seed}")
    columns = ["base", *(f"{weight:g}" for weight in WEIGHTS)]
    draw_paintings(rows, said, ASSETS / "dog_toy_weights.png", columns=columns, side=128)


def measure_regions(bench: Bench, folders: dict[str, Path]) -> dict[str, Any]:
    """Presence by who paints the two regions, and from which prompts."""
    seeds = [len(bench.seeds) + seed for seed in bench.seeds]
    found: dict[str, Any] = {}
    ways = {"each its own adapter": (folders["dog"], folders["toy"])}
    for rule in RULES:
        ways[f"{rule} 1 in both"] = (combine_once(bench, f"{rule} 1", rule, dict.fromkeys(folders.values(), 1.0)),) * 2
    ways["add 1 in both, one prompt"] = ways["add 1 in both"]
    both = f"{NAMES['dog']} and {NAMES['toy']}"
    for key, adapters in ways.items():
        bank = Bank(bench.base, {str(folder): folder for folder in adapters}, device="cpu")
        words = (both, both) if key.endswith("one prompt") else (NAMES["dog"], NAMES["toy"])
        images: list[Image.Image] = []
        for seed in seeds:
            prompts = [name_prompts(what, [seed])[0][0] for what in words]
            regions = [Region(str(folder), prompt) for folder, prompt in zip(adapters, prompts, strict=True)]
            images += paint_regions(bank, regions, seeds=[seed], sampling=bench.sampling)
        (bench.work / "images" / "regions").mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images[:SHOWN]):
            image.save(bench.work / "images" / "regions" / f"{key.replace(' ', '_')}_{i}.png")
        shares = find_subjects(images)
        shares["both"] = shares["dog"] * shares["toy"]
        grounds = score_prompts(images, [name_prompts(both, [seed])[0][0] for seed in seeds])
        found[key] = {name: find_share(share) for name, share in shares.items()} | find_means({"background": grounds})
        print(key, json.dumps({name: found[key][name]["value"] for name in PRESENCE}), flush=True)
    return found


def write_region_table(regions: dict[str, Any]) -> str:
    """A row for each way to paint two regions."""
    names = (*PRESENCE, "background")
    lines = ["| who paints the regions | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for key, scores in regions.items():
        lines.append(f"| {key} | " + " | ".join(format_score(scores[name], True) for name in names) + " |")
    return "\n".join(lines)


def write_results(found: dict[str, Any]) -> None:
    """The JSON, and a page of what is there so far."""
    write_json(RESULTS.with_suffix(".json"), found)
    ceilings = ", ".join(f"{value:.3f} of the {name}'s" for name, value in found["own_fidelity"].items())
    text = [
        write_table(found["points"]),
        f"{found['seeds']} seeds, {found['steps']} steps, guidance {found['guidance']:g}. The ceiling of fidelity, of "
        f"the subject's own images among each other: {ceilings}; the base's is the floor.",
        "\n".join(tell_losses(found["points"])),
        write_region_table(found["regions"]) if "regions" in found else "",
    ]
    RESULTS.with_suffix(".md").write_text("\n\n".join(filter(None, text)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default=JUDGED)
    parser.add_argument("--dog", type=Path, help="Adapter; default: trained by the recipe.")
    parser.add_argument("--toy", type=Path, help="Adapter; default: trained by the recipe.")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "dog_toy")
    parser.add_argument("--train-options", default="", help="Of recipes/dreambooth_lora.py, in one string.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folders = {name: getattr(given, name) or train(name, given.work, given.train_options.split()) for name in SUBJECTS}
    sampling = Sampling(given.steps, given.guidance, batch_size=given.batch_size)
    bench = Bench(given.base, range(given.seeds), sampling, given.work)
    settings = {
        "base": given.base,
        "adapters": {name: read_adapter(folders[name]).digest for name in SUBJECTS},
        "seeds": given.seeds,
        "steps": given.steps,
        "guidance": given.guidance,
    }
    stored = RESULTS.with_suffix(".json")
    found = json.loads(stored.read_text()) if stored.is_file() else {}
    if {key: found.get(key) for key in settings} != settings:  # other adapters: nothing of it counts
        found = {**settings, "points": {}}
    found["own_fidelity"] = {name: round(compare_own_images(own) or 0.0, 4) for name, own in bench.own.items()}
    found["machine"] = describe_machine("diffusers")
    for key, rule, weight, what in list_points(folders):
        if key in found["points"] and (given.work / "images" / key).is_dir():
            continue
        adapter = load_point(bench, key, rule, what)
        found["points"][key] = {"rule": rule, "weight": weight, "scores": bench.measure(key, adapter)}
        shares = {name: found["points"][key]["scores"][name]["value"] for name in PRESENCE}
        print(key, json.dumps(shares), flush=True)
        write_results(found)
    if "regions" not in found:
        found["regions"] = measure_regions(bench, folders)
        write_results(found)
    ASSETS.mkdir(exist_ok=True)
    draw_region_sheet(found["regions"], given.work)
    draw_presence(found["points"]).save(ASSETS / "dog_toy_presence.png")
    draw_sheets(found["points"], given.work)


if __name__ == "__main__":
    main()
