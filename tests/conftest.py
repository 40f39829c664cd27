"""What all tests share: no network, one thread (tiny models are slower on several), one trained adapter."""

import copy
import functools
import gc
import multiprocessing
import os
import pickle
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import jinja2
import pytest
import torch

import forked_program

torch.set_num_threads(1)
gc.disable()  # until the tests are collected: to search what is imported for garbage takes a third of the time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in forked processes comes first: one worker of pytest-xdist then has all of it, and one server."""
    items.sort(key=lambda item: "forked" not in item.fixturenames)


def pytest_collection_finish() -> None:
    """Imports and collected tests stay for the whole run: no later search for garbage looks through them. To compile a
    model makes a million objects, so a search begins after 50,000 rather than 700."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


_searched_s = 0.0  # when garbage was last searched for, in CPU time


def pytest_runtest_setup() -> None:
    """Every training ends with a search for garbage, which takes longer than the training of a tiny model where it
    looks through what earlier tests imported and compiled."""
    global _searched_s
    if time.process_time() > _searched_s + 2:
        gc.collect()
        gc.freeze()
        _searched_s = time.process_time()


@pytest.fixture(scope="session", autouse=True)
def compile_templates_once():
    """peft writes a card from the same template with every adapter, and huggingface_hub compiles it each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="session", autouse=True)
def read_embedded_bases_once():
    """To copy one takes a fifth of the time. What transformers draws for a new head moves no generator here, the first
    time or later: `load_base` draws it again."""
    from transformers import PreTrainedModel

    from inlay.bases.load import BUILTIN

    load = PreTrainedModel.from_pretrained.__func__

    @functools.lru_cache(maxsize=16)
    def load_once(model_class, folder, options):
        with torch.random.fork_rng(devices=[], device_type="cpu"):
            return load(model_class, folder, **pickle.loads(options))

    def load_copy(model_class, folder, *arguments, **options):
        changed = arguments or options.get("quantization_config") or options.get("device_map")
        if changed or not str(folder).startswith(str(BUILTIN)):
            return load(model_class, folder, *arguments, **options)
        return copy.deepcopy(load_once(model_class, folder, pickle.dumps(options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_copy))
        yield


@pytest.fixture(scope="session", autouse=True)
def draw_no_weights_without_memory():
    """GPT-2 draws its weights on the meta device too, by a way in Python that takes as long as to read them."""
    draw = torch.nn.init.normal_

    def draw_where_there_is_memory(tensor, *args, **options):
        return tensor if tensor.is_meta else draw(tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", draw_where_there_is_memory)
        yield


@pytest.fixture(scope="session", autouse=True)
def time_briefly():
    """Every recipe times its model for up to two seconds, which is not what most tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inlay.measure.costs._BUDGET_S", 0.05)
        yield


@pytest.fixture(scope="session", autouse=True)
def draw_embedded_data_once():
    """Whoever loads embedded data draws it anew, the same each time, as tests/builtin shows: here it is kept."""
    from inlay.builtin import bodies, restaurants, scenes
    from inlay.tasks.images import data as images

    def keep(draw):
        drawn = functools.cache(lambda *args, **options: pickle.dumps(draw(*args, **options)))
        return lambda *args, **options: pickle.loads(drawn(*args, **options))  # a copy, which may be changed

    draw_bodies = bodies.generate_bodies  # one after the other
    kept_bodies = keep(lambda *args, **options: list(draw_bodies(*args, **options)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "generate_bodies", lambda *args, **options: iter(kept_bodies(*args, **options)))
        patch.setattr(restaurants, "split_restaurants", keep(restaurants.split_restaurants))
        patch.setattr(scenes, "generate_scenes", keep(scenes.generate_scenes))
        patch.setattr(images, "_read_builtin", functools.cache(images._read_builtin))  # which nothing changes in place
        yield


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory):
    """Start `python ARGV` in a process forked from a server that has done the slow imports: for programs of which the
    start is not what is tested. `said` of the process is the file of its output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(forked_program.IMPORTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        multiprocessing.forkserver.ensure_running()
    folder, begun = tmp_path_factory.mktemp("said"), []

    def start(*argv: object, environment: dict[str, str] | None = None) -> multiprocessing.Process:
        said = folder / str(len(begun))
        arguments = [str(argument) for argument in argv], environment or {}, said
        process = context.Process(target=forked_program.run, args=arguments)
        process.said = said
        begun.append(process)
        process.start()
        return process

    yield start
    for process in begun:
        process.kill()


@pytest.fixture(scope="session")
def digits_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of builtin:vit-tiny on digits, not trained but not the identity either."""
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model

    from inlay import load_base, load_processor, save_adapter
    from inlay.bases.sites import head_modules, lora_targets

    set_seed(1)
    model = load_base("builtin:vit-tiny", labels=[f"digit {i}" for i in range(10)])
    config = LoraConfig(r=4, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    metrics = {"validation": {"accuracy": 0.5}, "dataset": "builtin:digits"}
    folder = tmp_path_factory.mktemp("hub") / "digits"
    return save_adapter(model, folder, processor=load_processor("builtin:vit-tiny"), metrics=metrics)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures in several formats and sizes."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i, (suffix, size) in enumerate([("png", 8), ("jpg", 40), ("bmp", 32), ("webp", 70), ("png", 33)]):
        Image.fromarray(generator.integers(0, 256, (size, size + i, 3), dtype=np.uint8)).save(folder / f"{i}.{suffix}")
    return folder
