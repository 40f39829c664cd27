"""FSDP2 in two processes, each as on a machine of its own: run, checkpoint and adapter are those of one process."""

import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sharded_job import train

from convolutional_networks import build_network
from docs.blocks import read_blocks
from forked_program import PATIENCE_S, finish, two_ranks
from inlay import InlayError, load_adapter, load_base, load_processor, save_adapter
from inlay.train.sharding import choose_model_to_train, drop_weights, join_weights, make_twin
from places import ROOT

JOB = ROOT / "tests/train/sharded_job.py"

pytestmark = pytest.mark.launch


def read_launch_file(title, folder):
    """The variables that `accelerate launch` makes of a file in the guide."""
    block = next(b for b in read_blocks(ROOT / "docs/guides/many_gpus.md") if b.title == title)
    (folder / title).write_text(block.text)
    args = launch_command_parser().parse_args(
        ["--config_file", str(folder / title), "--main_process_port", "0", "x.py"]
    )
    args, *_ = _validate_launch_command(args)
    return {
        name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(("ACCELERATE", "FSDP"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forked):
    """The runs whole, half (in bf16) and killed (in the fourth step), and those on a stream.

    Here, in one process, one and moved (killed). On a stream also with whole weights: one process reads another order.
    """
    folder = tmp_path_factory.mktemp("sharded")
    shards = read_launch_file("fsdp2.yaml", folder)
    one_each = {"ACCELERATE_USE_CPU": "false", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    one_each["ACCELERATE_MIXED_PRECISION"] = "no"

    def start(step):
        return [forked(JOB, folder, step, environment={**rank, **shards, **one_each}) for rank in two_ranks()]

    for process in start(4):
        process.join(PATIENCE_S)
        assert process.exitcode == -signal.SIGKILL, process.said.read_text()
    assert json.loads((folder / "killed/run/last/progress.json").read_text())["step"] == 2
    shutil.copytree(folder / "killed", folder / "moved")
    processes = start(0)
    train(folder / "one")
    train(folder / "moved")
    for rank, process in enumerate(processes):
        (folder / f"said {rank}").write_text(finish(process))
    for process in [forked(JOB, folder, "whole", environment=rank) for rank in two_ranks()]:
        finish(process)
    return folder


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_with_shards_train_and_save_as_one(folder):
    curves = [
        [json.loads(line) for line in (folder / name / "run/log.jsonl").read_text().splitlines()]
        for name in ("whole", "one")
    ]
    for mine, theirs in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    whole, one = adapter(folder / "whole"), adapter(folder / "one")
    assert whole.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(whole[name], one[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "atol"), [("killed", 0), ("moved", 1e-5)])
def test_a_killed_run_goes_on_in_shards_or_in_one_process(folder, name, atol):
    whole, resumed = adapter(folder / "whole"), adapter(folder / name)
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key], atol=atol, rtol=0)


def test_a_stream_trains_in_shards_as_with_whole_weights_and_goes_on(folder):
    assert json.loads((folder / "stream/run/run.json").read_text())["shards"] == 4
    runs = "stream", "stream of whole weights", "stopped stream"
    shards, whole, stopped = (adapter(folder / name) for name in runs)
    for key in whole:
        torch.testing.assert_close(shards[key], whole[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(stopped[key], shards[key], atol=0, rtol=0)
    log = (folder / "stopped stream/run/log.jsonl").read_text()
    assert log == (folder / "stream/run/log.jsonl").read_text()


@pytest.mark.parametrize("name", ["whole", "half", "stream"])
def test_the_saved_adapter_computes_what_the_joined_model_computed(folder, name):
    loaded = load_adapter(folder / name / "adapter")
    assert loaded.verified
    assert loaded.deviation < 1e-5
    assert {value.dtype for value in adapter(folder / name).values()} == {torch.float32}


def test_nan_that_one_process_sees_is_named_by_all(folder):
    pattern = r"refused: (training broke at step \d+: .* the input 'pixel_values' holds NaN or Inf .*)"
    said = [re.search(pattern, (folder / f"said {rank}").read_text())[1] for rank in (0, 1)]
    assert said[0] == said[1]


def test_machines_without_a_shared_disk_are_told(folder):
    for rank in (0, 1):
        said = (folder / f"said {rank}").read_text()
        assert (
            f"cannot see the files that the main process writes to {folder}/disk {rank}; choose an --output_dir" in said
        )
    assert not (folder / "disk 1").exists()
    assert list((folder / "disk 0").iterdir()) == [], "a refused launch must leave nothing"


def build_model():
    base = load_base("builtin:vit-tiny", labels=["a", "b"])
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))


def test_a_twin_shares_the_tensors_and_gives_them_back():
    model = build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = make_twin(model)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert mine is not theirs and mine.data_ptr() == theirs.data_ptr(), name
        assert mine.requires_grad == theirs.requires_grad
    drop_weights(model, twin)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    join_weights(model, twin, torch.device("cpu"))
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("model", "blocks", "embeddings"),
    [
        (build_model, ["ViTLayer"], "ViTPatchEmbeddings"),
        (lambda: build_network("ResNet"), ["ResNetBottleNeckLayer"], "NoneType"),
    ],
)
def test_fsdp2_is_told_the_blocks_and_whether_there_are_input_embeddings(model, blocks, embeddings):
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin)
    twin = choose_model_to_train(model(), SimpleNamespace(is_fsdp2=True, state=state))
    assert plugin.transformer_cls_names_to_wrap == blocks
    assert type(twin.get_input_embeddings()).__name__ == embeddings


def test_weights_in_shards_are_not_saved(tmp_path):
    model = build_model()
    next(model.parameters()).ds_id = 0  # as ZeRO 3 marks them
    with pytest.raises(InlayError, match=r"in shards .* train it with inlay\.fit, which joins them"):
        save_adapter(model, tmp_path / "a", processor=load_processor("builtin:vit-tiny"))
