"""The report before adapters are combined."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from combine.cases import lora, partial, save, updates, wide
from inlay import InlayError
from inlay.combine.heatmap import write_report
from inlay.combine.report import MEASURES, measures, overlap
from inlay.methods import METHODS
from methods.bases import build


def test_measures_equal_their_definitions(tmp_path):
    a, b = (save(tmp_path / n, "vit", lora(r=r), s) for n, r, s in (("a", 4, 3), ("b", 2, 4)))
    found = {m.module: m for m in overlap({a: 2.0, b: -1.0}).meetings}
    for site, first in updates(a).items():
        x, y, m = 2 * first, -updates(b)[site], found[site]
        assert m.cosine == pytest.approx(((x * y).sum() / x.norm() / y.norm()).item(), abs=1e-6)
        assert m.conflict == pytest.approx((x * y < 0).double().mean().item(), abs=2e-3)
        (u_x, _, v_x), (u_y, _, v_y) = (torch.linalg.svd(z) for z in (x, y))
        written = (u_x[:, :4].T @ u_y[:, :2]).square().sum() / 2
        read = (v_x[:4] @ v_y[:2].T).square().sum() / 2
        assert m.read == pytest.approx(read.item(), abs=1e-6) and m.written == pytest.approx(written.item(), abs=1e-6)
        both = [(y @ v_x[:4].T).norm() / x.norm(), (x @ v_y[:2].T).norm() / y.norm()]
        assert m.interference == pytest.approx(max(both).item(), abs=1e-6)


def test_extremes():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    alike = measures((up, down), (2 * up, down))
    assert alike["cosine"] == pytest.approx(1) and alike["read"] == pytest.approx(1) and alike["conflict"] == 0
    assert alike["interference"] == pytest.approx(2)
    against = measures((up, down), (-up, down))
    assert against["cosine"] == pytest.approx(-1) and against["conflict"] == 1
    apart = measures((np.eye(6, 2, dtype=np.float32), np.eye(2, 5, dtype=np.float32)), (up * 0, down))
    assert apart == dict.fromkeys(MEASURES)
    left = np.zeros((2, 5), np.float32)
    left[0, 3] = left[1, 4] = 1
    clear = measures((up, np.eye(2, 5, dtype=np.float32)), (up, left))
    assert clear["read"] == 0 and clear["interference"] == 0 and clear["written"] == pytest.approx(1)


def test_report_of_other_methods_and_of_modules_that_do_not_meet(tmp_path):
    a = save(tmp_path / "a", "vit", lora(target_modules=["q_proj"]), 3)
    b = save(tmp_path / "b", "vit", lora(target_modules=["fc1"]), 4)
    report = overlap({a: 1.0, b: 1.0})
    assert not report.meetings and "no module in common" in str(report) and len(report.alone["a"]) == 3
    with pytest.raises(InlayError, match=r"not 0; write a \.txt"):
        write_report(report, tmp_path / "none.png")
    for config in (wide(), partial(), METHODS["ia3"].config(build("vit"), 0)):
        pair = [save(tmp_path / f"{type(config).__name__}{s}", "vit", config, s) for s in (5, 6)]
        met = overlap(dict.fromkeys(pair, 1.0)).meetings
        assert met and all(-1 <= m.cosine <= 1 and 0 <= m.conflict <= 1 and m.interference > 0 for m in met)
    config = METHODS["attention-prefix"].config(build("vit"), 3)
    pair = [save(tmp_path / f"prefix{s}", "vit", config, s) for s in (5, 6)]
    assert all(m.cosine is None for m in overlap(dict.fromkeys(pair, 1.0)).meetings)


def test_report_as_text_json_and_picture(tmp_path):
    folders = [save(tmp_path / n, "vit", lora(), s) for n, s in (("digits", 3), ("shapes", 4), ("third", 5))]
    weights = load_file(folders[2] / "adapter_model.safetensors")
    save_file({k: v * 0 for k, v in weights.items()}, folders[2] / "adapter_model.safetensors", {"format": "pt"})
    report = overlap(dict(zip(folders, (1.0, -0.5, 1.0), strict=True)))
    assert "digits and shapes: 9 modules in common; on average cosine" in str(report) and "cosine -," in str(report)
    read = json.loads(write_report(report, tmp_path / "r.json").read_text())
    assert read["adapters"] == {"digits": 1.0, "shapes": -0.5, "third": 1.0} and len(read["meetings"]) == 27
    assert write_report(report, tmp_path / "r.txt").read_text().startswith("digits x 1")
    with Image.open(write_report(report, tmp_path / "r.png")) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert picture.size[0] > 900 and (232, 232, 232) in colours and len(colours) > 30
    with pytest.raises(InlayError, match=r"\.png, \.json or \.txt"):
        write_report(report, tmp_path / "r.pdf")
