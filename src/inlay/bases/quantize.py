"""Frozen bases in 8 and 4 bits, through bitsandbytes."""

import logging
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.diffusion.sites import list_denoiser_layers
from inlay.bases.sites import head_modules, is_linear, linear_shape
from inlay.errors import BadInput, Unsupported

Quantize = Literal["8bit", "4bit"]


def make_quantization_config(quantize: Quantize | None, name: str, config: Any, kind: Any, dtype: str) -> Any:
    """bitsandbytes' settings for a base of the auto class `kind`.

    Head and pooler stay whole, as an int8 weight cannot be trained; of a text-to-image pipeline all but the linear
    layers in the denoiser's blocks. So do, under 4 bits, layers whose input is no multiple of NF4's block of 64:
    bitsandbytes 0.50 dequantises them wrongly on a CPU (relative error 0.23 instead of 0.09 for 96 inputs).
    """
    if quantize is None:
        return None
    if quantize not in ("8bit", "4bit"):
        raise BadInput(f"quantize must be '8bit' or '4bit', got {quantize!r}.")
    bits = int(quantize[0])
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise Unsupported(f"a {bits}-bit base needs bitsandbytes: pip install 'inlay[quantize]'.") from None
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        skeleton = kind.from_config(config, trust_remote_code=False)
    linear = {n: m for n, m in skeleton.named_modules() if is_linear(m)}
    if is_diffusion(config):
        inside = {n for n, _ in list_denoiser_layers(skeleton)}
        heads = [n for n in linear if n not in inside]
    else:
        heads = head_modules(skeleton)
        heads += [n for n, _ in skeleton.named_modules() if n.rpartition(".")[2] == "pooler"]  # it may be new as well
    outside = tuple(f"{head}." for head in heads)
    linear = {n: m for n, m in linear.items() if not f"{n}.".startswith(outside)}
    whole = [n for n, m in linear.items() if bits == 4 and linear_shape(m)[0] % 64]
    if len(whole) == len(linear):
        raise Unsupported(f"{name} has no linear layer outside its head that {bits} bits can hold; leave quantize out.")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one warning a product in eval mode
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=heads + whole,
    )


def quantize_layers(model: Any, settings: Any, device: str | torch.device) -> None:
    """Quantise the linear layers of a loaded text-to-image base in place, on the device that they go to.

    As transformers does where it loads a model by itself; diffusers does so only on a GPU.
    """
    from transformers.integrations import replace_with_bnb_linear

    whole = dict(model.named_modules())
    replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
    for name, layer in model.named_modules():
        if layer is not whole[name]:
            weight = layer.weight
            layer.weight = type(weight)(whole[name].weight.data, requires_grad=False, **vars(weight)).to(device)
            layer.bias = whole[name].bias
    model.to(device)
    model.is_quantized = True
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = settings.load_in_8bit, settings.load_in_4bit  # read by peft


def find_stored_form(name: str, config: Any, quantize: Quantize | None) -> str | None:
    """In which form the weights of a base are stored: 8bit or 4bit, another method's name, or None where whole.

    Raises:
        InlayError: They are quantised already, and `quantize` asks for another form.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    form = next((bits for bits in ("8bit", "4bit") if settings.get(f"load_in_{bits}")), None)
    form = form or str(settings.get("quant_method") or "another form")
    if quantize is not None and quantize != form:
        raise BadInput(
            f"the weights of {name} are stored in {form} already, so quantize={quantize!r} would have no effect; leave "
            "quantize out, or give the base whose weights are whole."
        )
    return form


def compute_plainly(model: PreTrainedModel) -> None:
    """Keep NF4 layers from repacking themselves at their first use in eval mode on a CPU with AVX512-BF16.

    bitsandbytes' packed form cannot be dequantised (a sketch of it is wrong), has no gradient (training after an
    evaluation is), and fails for sizes that are no multiple of 32. On other devices the attribute has no effect.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def flatten_inputs() -> None:
    """Let bitsandbytes' int8 layers take inputs of more than three axes, once per process.

    Those of SAM are B H W C: in eval mode on a CPU, bitsandbytes 0.50 fails for them.
    """
    from bitsandbytes.nn import Linear8bitLt

    plain = Linear8bitLt.forward
    if getattr(plain, "flattens", False):
        return

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.ndim > 3 else plain(self, x)

    forward.flattens = True  # type: ignore[attr-defined]
    Linear8bitLt.forward = forward
