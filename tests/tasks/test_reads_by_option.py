"""Options of a training: with none of them a step reads from its device, which would make the host wait for it."""

import pytest
from peft import LoraConfig, get_peft_model
from torch.utils.data import Subset

from host_reads import watch_steps
from inlay import ImageTask, SpatialAdapterConfig, TextTask, TrainConfig, VolumeTask, fit, head_modules
from inlay.tasks.text import chunked_logits
from inlay.tasks.text import loss as text_loss


def adapt_images(options, data):
    model = options.base(data)
    convolutional = "mobilenet" in options.model
    targets = ["conv_1x1.convolution"] if convolutional else ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=head_modules(model)))


def adapt_texts(options, data):
    return get_peft_model(options.base(data), LoraConfig(r=2, target_modules=["c_attn"]))


def adapt_volumes(options, data):
    model, spacing = options.base(data), data.processor.spacing_mm
    config = SpatialAdapterConfig.fitted(model, data.source.labels, options.crop, spacing, 4, simulated="mixed")
    return get_peft_model(model, config)


@pytest.mark.parametrize(
    ("options", "adapt", "training"),
    [
        pytest.param(ImageTask(), adapt_images, {"ema": 0.9}, id="ema"),
        pytest.param(ImageTask(mixup=0.4), adapt_images, {}, id="mixup"),
        pytest.param(ImageTask(randaugment=9), adapt_images, {}, id="randaugment"),
        pytest.param(ImageTask(label_smoothing=0.1), adapt_images, {}, id="label smoothing of images"),
        pytest.param(ImageTask(), adapt_images, {"precision": "bf16"}, id="bf16"),
        pytest.param(ImageTask(), adapt_images, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(
            ImageTask(model="builtin:mobilenet-tiny"), adapt_images, {"channels_last": True}, id="channels last"
        ),
        pytest.param(TextTask(label_smoothing=0.1), adapt_texts, {}, id="label smoothing of texts"),
        pytest.param(TextTask(), adapt_texts, {"accumulate": 2}, id="logits in chunks"),
        pytest.param(VolumeTask(), adapt_volumes, {"batch_size": 1}, id="scans with users of several kinds"),
    ],
)
def test_no_step_reads_from_the_device(options, adapt, training, tmp_path, monkeypatch, request):
    in_chunks = request.node.callspec.id == "logits in chunks"
    if in_chunks:
        for module in (chunked_logits, text_loss):
            monkeypatch.setattr(module, "CHUNK", 2000)
    chunks = []
    monkeypatch.setattr(text_loss, "run_in_chunks", note_calls(text_loss.run_in_chunks, chunks))
    data = options.load(0)
    model = adapt(options, data)
    config = TrainConfig(str(tmp_path / "run"), **{"steps": 4, "batch_size": 2, "workers": 0, **training})
    with watch_steps() as reads:
        result = fit(model, Subset(data.train, range(8)), None, config, collate=data.collate, loss=data.loss)
    assert result.steps == 4 and reads == []
    assert bool(chunks) == in_chunks


def note_calls(function, calls):
    def noting(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return noting
