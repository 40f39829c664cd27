"""Start accelerate, refuse launches that would not train as requested, and build the optimiser and the data loaders."""

import atexit
import ctypes
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    LoggerType,
    ProjectConfiguration,
    parse_flag_from_env,
)
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers.modeling_layers import GradientCheckpointingLayer

from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import fills_cache
from inlay.train.collate import FinishedBatches, split_collate
from inlay.train.config import TrainConfig
from inlay.train.stream import StreamCollate, StreamLoader, StreamSampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from inlay.train.frozen_cache.frozen_blocks import FitData
    from inlay.train.sampler import SeededSampler

    Collate = Callable[[list[Any]], dict[str, Any]]


def start_accelerator(model: torch.nn.Module, config: TrainConfig) -> Accelerator:
    """The Accelerator of this process, checked to train as requested.

    Raises:
        InlayError: fp16 on a CPU (accelerate ignores it); several processes that do not see each other; a batch that
            does not divide evenly among the processes; a tracker that is not installed; a sharding as in
            `check_sharding`.
    """
    if config.tracker is not None:
        _check_tracker(config.tracker)
    # Otherwise accelerate keeps the precision of this process's first run, and after one in shards starts none again.
    first = PartialState._shared_state.get("distributed_type")
    AcceleratorState._reset_state(reset_partial_state=first in (DistributedType.FSDP, DistributedType.DEEPSPEED))
    accelerator = Accelerator(
        mixed_precision=_choose_precision(model, config),
        log_with=config.tracker,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs")
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=torch.cuda.is_available()),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        step_scheduler_with_optimizer=True,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise Unsupported("fp16 needs a GPU: on a CPU accelerate ignores it. Use --precision no, or bf16.")
    _check_process_count(accelerator)
    check_sharding(accelerator, model, config)
    atexit.register(accelerator.state.destroy_process_group)
    if config.batch_size % accelerator.num_processes:
        raise BadInput(
            f"batch_size {config.batch_size} is the batch of all processes, so it must be a multiple of their number, "
            f"{accelerator.num_processes}."
        )
    if accelerator.device.type == "cpu":
        _mention_idle_cores(accelerator)
        _keep_freed_memory()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # accelerate cannot read the batch size from our batch sampler
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size // accelerator.num_processes
        plugin.deepspeed_config["gradient_clipping"] = config.clip_norm  # the engine clips when it steps
    return accelerator


def _choose_precision(model: torch.nn.Module, config: TrainConfig) -> str | None:
    """The mixed precision for accelerate; None leaves the choice to `accelerate launch`.

    If neither the settings nor the launcher choose, a half-precision base is trained in its own dtype.
    """
    if config.precision != "auto":
        return config.precision
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    halves = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[halves.pop()] if halves else None


def _check_tracker(name: str) -> None:
    known = {tracker.value for tracker in LoggerType} - {"all"}
    if name not in known:
        raise BadInput(f"unknown tracker {name!r}; accelerate has {', '.join(sorted(known))}.")
    if name not in {tracker.value for tracker in get_available_trackers()}:
        raise Unsupported(f"the tracker {name!r} is not installed: pip install {name}.")


def _mention_idle_cores(accelerator: Accelerator) -> None:
    """Say how to use all cores: `accelerate launch` gives each CPU process one thread by default."""
    cores, used = os.cpu_count() or 1, torch.get_num_threads() * accelerator.num_processes
    if "ACCELERATE_MIXED_PRECISION" in os.environ and 2 * used < cores:
        option = f"--num_cpu_threads_per_process {cores // accelerator.num_processes}"
        accelerator.print(f"training on {used} of {cores} CPU cores; accelerate launch {option} ... uses them all")


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step, instead of returning it to the system.

    torch allocates CPU tensors with malloc, which maps every large tensor anew. The page faults cost more than half of
    a MobileNetV2 step. Systems without mallopt (macOS, musl) are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
        mallopt(trim_threshold, largest)
        mallopt(mmap_threshold, largest)


def _check_process_count(accelerator: Accelerator) -> None:
    """Refuse a launch where accelerate sees another number of processes than was requested.

    Two launches do this: `--multi_gpu` or `--use_fsdp` without a GPU starts processes that do not see each other, and
    `--cpu --num_processes 2` starts one process only (it sets MASTER_ADDR, but not WORLD_SIZE).
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    started_one = launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked != accelerator.num_processes or started_one:
        raise BadInput(
            f"{asked if asked > 1 else 'several'} processes were requested, but each would train by itself; on CPUs "
            "start them with: ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ..."
        )


def check_sharding(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> None:
    """Refuse, before the training, a sharding that is not the one asked for, or that this model or setting lacks.

    Raises:
        Unsupported: Another sharding than FSDP2 and DeepSpeed ZeRO; FSDP2 with an 8-bit base, an 8-bit optimiser or a
            weight without an axis.
    """
    kind, plugin = accelerator.distributed_type, accelerator.state.deepspeed_plugin
    for asked, wanted in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if parse_flag_from_env(f"ACCELERATE_USE_{asked}") and kind != wanted:
            raise Unsupported(
                f"accelerate shards weights on GPUs only and would ignore {asked} here; on CPUs start with: "
                "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ..."
            )
    if kind == DistributedType.MEGATRON_LM:
        raise Unsupported("Megatron-LM divides layers, which inlay cannot save; start with FSDP2 or DeepSpeed.")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise Unsupported(
            "FSDP1 flattens the weights of a layer into one, so an adapter cannot train in a frozen layer; set "
            "fsdp_version: 2 in the launch file, or --fsdp_version 2."
        )
    if plugin and plugin.gradient_accumulation_steps not in (1, "auto"):
        raise Unsupported(
            f"gradient_accumulation_steps {plugin.gradient_accumulation_steps} would divide the loss once more; set it "
            "to 1 in the launch file, and give the pieces of a step as --accumulate."
        )
    if accelerator.is_fsdp2:
        _check_fsdp2(accelerator.state.fsdp_plugin, model, config)


def _check_fsdp2(plugin: Any, model: nn.Module, config: TrainConfig) -> None:
    if plugin.cpu_ram_efficient_loading:
        raise Unsupported(
            "with fsdp_cpu_ram_efficient_loading, which is accelerate's default, only one process has the weights of "
            "the base; set it to false in the launch file, or --fsdp_cpu_ram_efficient_loading false."
        )
    if getattr(model, "is_loaded_in_8bit", False):
        raise Unsupported("FSDP2 cannot shard a base in 8 bits; hold it in 4 bits or whole, or start with --multi_gpu.")
    if config.optimizer != "adamw":
        raise Unsupported(
            f"the optimizer {config.optimizer} cannot update weights in shards; use --optimizer adamw, whose moments "
            "FSDP2 shards too."
        )
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise Unsupported(f"FSDP2 cannot shard the single number {scalars[0]!r}; start with --multi_gpu.")


def build_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in 32 or 8 bits, paged or not, without weight decay for biases, norms and other vectors."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)  # one kernel for all, several times faster
        return torch.optim.AdamW(groups, lr=config.rate, fused=fused)
    if config.optimizer.startswith("paged") and not torch.cuda.is_available():
        raise Unsupported(
            f"--optimizer {config.optimizer} pages the memory of a CUDA GPU; use adamw or adamw8bit here."
        )
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
    except ImportError:
        raise Unsupported(
            f"--optimizer {config.optimizer} needs bitsandbytes: pip install 'inlay[quantize]'."
        ) from None
    kinds = {"adamw8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw8bit": PagedAdamW8bit}
    return kinds[config.optimizer](groups, lr=config.rate)


def build_loaders(
    data: "FitData", order: "SeededSampler | StreamSampler", batch_size: int, accelerator: Accelerator
) -> tuple[Any, FinishedBatches | None]:
    """Loaders of the training data in the given order, unfinished, and of validation data, short examples first."""
    train = build_step_loader(data, order, accelerator)
    if data.validation is None:
        return train, None
    lengths = getattr(data.validation, "lengths", None)
    sampler = None if lengths is None else sorted(range(len(lengths)), key=lengths.__getitem__)
    stack, finish = split_collate(data.collate)
    validation = build_loader(
        data.validation,
        stack,
        data.workers,
        accelerator,
        prefetch=data.prefetch,
        batch_size=batch_size,
        sampler=sampler,
    )
    return train, FinishedBatches(validation, finish)


def build_step_loader(data: "FitData", order: "SeededSampler | StreamSampler", accelerator: Accelerator) -> Any:
    """The training batches in this order, unfinished and still on the CPU: a step counts labels there."""
    stack, _ = split_collate(data.collate)
    if isinstance(order, StreamSampler):  # each process reads its own share
        workers = data.workers if order.stream.needs_workers else 0
        return StreamLoader(
            _make_loader(data.train, StreamCollate(stack), workers, data.prefetch, batch_sampler=order), order
        )
    return build_loader(
        data.train, stack, data.workers, accelerator, place=False, prefetch=data.prefetch, batch_sampler=order
    )


def read_step_batch(
    data: "FitData", order: "SeededSampler | StreamSampler", accelerator: Accelerator, step: int
) -> dict[str, Any]:
    """This process's share of the batch of a step, read again, unfinished."""
    return next(iter(build_step_loader(replace(data, workers=0), order.start_at(step), accelerator)))


def build_loader(
    data: Any,
    collate: "Collate | None",
    workers: int,
    accelerator: Accelerator,
    *,
    place: bool = True,
    prefetch: int = 2,
    **order: Any,
) -> Any:
    """A DataLoader whose batches accelerate divides among the processes and, with `place`, moves to the device."""
    loader = _make_loader(data, collate, workers, prefetch, **order)
    return accelerator.prepare_data_loader(loader, device_placement=place)


def _make_loader(data: Any, collate: Any, workers: int, prefetch: int, **order: Any) -> DataLoader[Any]:
    return DataLoader(
        data,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_main,
        persistent_workers=workers > 0 and "batch_size" in order,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _leave_signals_to_main(worker: int) -> None:
    """Keep a data worker alive when a signal stops the run: the main process needs it to finish its step.

    Ctrl-C goes to the process group, so the worker leaves the group. A scheduler may send SIGTERM to every process, so
    the first one is ignored; the second one, which the DataLoader sends when it ends, kills the worker.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def enable_checkpointing(model: nn.Module) -> None:
    """Switch gradient checkpointing on.

    Raises:
        InlayError: The model has none, or its adapter is in the key-value cache, which checkpointing does not use.
    """
    if fills_cache(model):
        raise Unsupported(
            "peft's prefix tuning puts keys and values into the cache, which gradient checkpointing does not use; "
            "leave the setting out, or train an attention prefix (AttentionPrefixConfig), which needs no cache."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(isinstance(module, GradientCheckpointingLayer) for module in base.modules()):
        base.supports_gradient_checkpointing = True  # transformers does not say so of SAM 2, whose blocks can do it
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # its name in earlier versions of transformers
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise Unsupported(f"this model has no gradient checkpointing ({error}); leave the setting out.") from None


def disable_checkpointing(model: nn.Module) -> None:
    """Switch gradient checkpointing off, and also the gradients of the inputs, which transformers leaves on."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


def release_model(accelerator: Accelerator, model: nn.Module) -> None:
    """Close trackers and loaders, and remove accelerate's autocast from the forward of `model`."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.dschf = None  # under ZeRO 3 transformers would load the next base in shards
