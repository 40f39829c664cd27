"""The folder of a run is kept, resumed, refused or overwritten as its content says."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from train_job import Net, Points, trainable

from inlay.errors import InlayError, Unsupported
from inlay.files.atomic import lock_folder
from inlay.tasks.metrics import Accuracy
from inlay.train import run
from inlay.train.config import TrainConfig
from inlay.train.launch import check_sharding
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
    assert "holds a finished run, which is kept" in capsys.readouterr().out
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


def test_options_that_an_earlier_version_did_not_have_were_off(tmp_path):
    train(tmp_path / "run", settings={"rank": 4})
    assert train(tmp_path / "run", settings={"rank": 4, "pack": False, "mixup": 0.0, "attention": None}).resumed
    with pytest.raises(InlayError, match=r"other settings \(pack None -> True\)"):
        train(tmp_path / "run", settings={"rank": 4, "pack": True})


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


def test_a_second_run_of_one_folder_is_refused_while_the_first_one_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_WORKERS_END_S", 0.2)
    folder = tmp_path / "run"
    with lock_folder(folder), ThreadPoolExecutor(1) as pool:  # a lock is one thread's, as it is one process's
        second = pool.submit(train, folder)
        with pytest.raises(InlayError, match=r"another process is writing .*run; wait until it has ended"):
            second.result()
    assert not folder.exists()
    assert not train(folder).resumed
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "the lock went with the run"


def test_a_run_that_broke_leaves_its_folder_free(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_WORKERS_END_S", 0.2)
    broken = Net()
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(InlayError, match="NaN") as kept:  # kept, as a notebook keeps the last error and its frames
        train(tmp_path / "run", broken)
    assert train(tmp_path / "run", overwrite=True).steps == 11
    assert kept.value


def fake_accelerator(kind, fsdp2=False, stage=None, pieces=1):
    plugin = stage and SimpleNamespace(zero_stage=stage, gradient_accumulation_steps=pieces)
    shards = SimpleNamespace(cpu_ram_efficient_loading=False)
    state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=shards)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2, state=state)


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (fake_accelerator(DistributedType.FSDP), "set fsdp_version: 2 in the launch file"),
        (fake_accelerator(DistributedType.FSDP, fsdp2=True), None),
        (fake_accelerator(DistributedType.MEGATRON_LM), "start with FSDP2 or DeepSpeed"),
        (fake_accelerator(DistributedType.DEEPSPEED, stage=2, pieces=2), "gradient_accumulation_steps 2 would divide"),
        (fake_accelerator(DistributedType.DEEPSPEED, stage=2, pieces="auto"), None),
        (fake_accelerator(DistributedType.DEEPSPEED, stage=3), None),
        (fake_accelerator(DistributedType.MULTI_GPU), None),
    ],
)
def test_a_sharding_that_cannot_be_saved_is_refused(accelerator, message):
    with pytest.raises(Unsupported, match=message) if message else nullcontext():
        check_sharding(accelerator, Net(), TrainConfig(accumulate=4))


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_a_sharding_that_accelerate_would_ignore_on_a_cpu_is_refused(monkeypatch, asked):
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(Unsupported, match=f"would ignore {asked} here; on CPUs start with: ACCELERATE_USE_CPU=1"):
        check_sharding(fake_accelerator(DistributedType.MULTI_CPU), Net(), TrainConfig())


@pytest.mark.parametrize(
    ("change", "optimizer", "message"),
    [
        (lambda net: setattr(net, "is_loaded_in_8bit", True), "adamw", "cannot shard a base in 8 bits"),
        (lambda net: None, "adamw8bit", "adamw8bit cannot update weights in shards"),
        (lambda net: net.register_parameter("scale", nn.Parameter(torch.ones(()))), "adamw", "single number 'scale'"),
    ],
)
def test_what_fsdp2_cannot_shard_is_refused(change, optimizer, message):
    net = Net()
    change(net)
    with pytest.raises(Unsupported, match=message):
        check_sharding(fake_accelerator(DistributedType.FSDP, fsdp2=True), net, TrainConfig(optimizer=optimizer))


def test_processes_without_weights_are_refused():
    accelerator = fake_accelerator(DistributedType.FSDP, fsdp2=True)
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
    with pytest.raises(Unsupported, match="or --fsdp_cpu_ram_efficient_loading false"):
        check_sharding(accelerator, Net(), TrainConfig())


def test_what_needs_whole_weights_is_refused_with_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.train.loop.has_shards", lambda accelerator: True)
    with pytest.raises(Unsupported, match="--ema and --channels_last and samples and a prior on the way cannot be had"):
        fit(
            Net(),
            Points(44, 1),
            None,
            TrainConfig(str(tmp_path / "run"), ema=0.9, channels_last=True),
            callback=SimpleNamespace(),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_refused_sharding_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(Unsupported, match="fsdp_version: 2"):
        train(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
