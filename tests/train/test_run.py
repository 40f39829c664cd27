"""The folder of a run is kept, resumed, refused or overwritten as its content says."""

import json

import pytest
import torch
from train_job import Net, Points, trainable

from inlay.errors import InlayError
from inlay.tasks.metrics import Accuracy
from inlay.train.config import TrainConfig
from inlay.train.loop import fit


def train(folder, net=None, settings=None, **config):
    config = TrainConfig(str(folder), **{"batch_size": 8, "epochs": 2, "workers": 0, **config})
    return fit(net or Net(), Points(44, 1), Points(13, 2), config, metrics=[Accuracy()], settings=settings)


def files(folder):
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_is_kept_and_read_back(tmp_path, capsys):
    first, second = Net(), Net()
    one = train(tmp_path / "run", first)
    before = files(tmp_path / "run")
    two = train(tmp_path / "run", second, workers=1, tracker="tensorboard", save_every=3)
    assert "holds a finished run: kept" in capsys.readouterr().out
    assert files(tmp_path / "run") == before
    assert not one.resumed and two.resumed and not second.training
    assert {**vars(one), "resumed": True} == vars(two)
    for name, weight in trainable(first).items():
        assert torch.equal(weight, trainable(second)[name])


def test_overwrite_trains_anew_and_spares_other_files(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter").mkdir()
    result = train(folder, seed=1, overwrite=True)
    assert not result.resumed
    assert json.loads((folder / "run.json").read_text())["seed"] == 1
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "gradient_norm" in r] == list(range(1, 12))
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "adapter").is_dir()


def test_other_settings_are_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    train(folder, settings={"rank": 4})
    before = files(folder)
    for changed, message in [
        ({"learning_rate": 0.1}, r"learning_rate 0.003 -> 0.1\)"),
        ({"settings": {"rank": 8}}, r"\(rank 4 -> 8\)"),
        ({"settings": {"rank": 4, "quantize": "8bit"}}, r"\(quantize None -> '8bit'\)"),
        ({"precision": "bf16"}, r"\(precision 'no' -> 'bf16'\)"),
        ({"seed": 1, "epochs": 3}, r"\(epochs 2 -> 3, seed 0 -> 1\)"),
    ]:
        with pytest.raises(InlayError, match=message):
            train(folder, **{"settings": {"rank": 4}, **changed})
    assert files(folder) == before
    assert train(folder, settings={"rank": 4}).resumed


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(InlayError, match="holds other files"):
        train(tmp_path, overwrite=overwrite)
    assert files(tmp_path) == before
    with pytest.raises(InlayError, match="is a file"):
        train(tmp_path / "thesis.tex", overwrite=overwrite)


def test_damaged_runs_are_refused_in_words(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    (folder / "best" / "trainable.safetensors").unlink()
    with pytest.raises(InlayError, match="the weights of this run are gone"):
        train(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(InlayError, match="not readable as JSON"):
        train(folder)
    assert not train(folder, overwrite=True).resumed


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    other = Net()
    other.base.requires_grad_(True)
    with pytest.raises(InlayError, match="of another model"):
        train(folder, other)
