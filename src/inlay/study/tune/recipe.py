"""The recipe of one adapter that `inlay tune` found: train, measure and save it.

    accelerate launch train.py config.yaml

config.yaml holds what was found; each of its lines is an option of this file too (--help). To train the adapter on
other data, change `dataset`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class PlacedMethod:
    """A method of inlay.METHODS, and where it attaches."""

    method: str = option("lora", "Name in inlay.METHODS.")
    width: int = option(8, "Rank or other width of the adapter.", least=1)
    blocks: list[int] = option([], "Numbers of the blocks that are adapted, from 0; none: all.", least=0)
    modules: Literal["all", "attention", "mlp"] = option("all", "Which layers of a block.")
    split_seed: int = option(0, "Chooses what is held out where the data does not.", least=0)


def main(placed: PlacedMethod, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate.utils import set_seed

    from inlay import METHODS, describe_run, narrow_sites, save_adapter

    # 1. data and frozen base; the test part stays unseen
    data = task.load_parts(placed.split_seed).data
    set_seed(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and a new head are trainable
    method = METHODS[placed.method]
    config = task.fit_method(method.make_config(model, placed.width), model, data)
    model = method.attach(model, narrow_sites(config, model, placed.blocks or None, placed.modules))

    # 3. train
    result = task.fit(model, data, train, placed)

    # 4. measure
    metrics = describe_run(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=metrics)
    print(f"{metrics['validation']}; saved {folder}")
    return folder


if __name__ == "__main__":
    run_recipe(main, PlacedMethod(), ImageTask(), TrainConfig(output_dir="run"))
