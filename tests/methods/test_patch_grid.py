"""ConvPass convolves over the grid in which the patches really lie, whatever the image and its other tokens."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from inlay import CompositeConfig, ConvPassConfig, InlayError, VisualPromptConfig
from inlay.methods.convpass import ConvPassLayer
from methods.bases import SIZE, build, randomise

IMAGE = {**SIZE, "image_size": 16, "patch_size": 4}
ENCODERS = {  # tokens in front of those of the patches
    "ViTModel": (hf.ViTConfig, IMAGE, 1),
    "DeiTModel": (hf.DeiTConfig, IMAGE, 2),
    "Dinov2Model": (hf.Dinov2Config, {**IMAGE, "intermediate_size": None}, 1),
    "Dinov2WithRegistersModel": (
        hf.Dinov2WithRegistersConfig,
        {**IMAGE, "intermediate_size": None, "num_register_tokens": 3},
        4,
    ),
    "CLIPVisionModel": (hf.CLIPVisionConfig, IMAGE, 1),
    "SiglipVisionModel": (hf.SiglipVisionConfig, IMAGE, 0),
}


def encoder(name):
    torch.manual_seed(0)
    config, settings, _ = ENCODERS[name]
    config = config(**{key: value for key, value in settings.items() if value is not None})
    return getattr(hf, name)(config).double().eval().requires_grad_(False)


def attach(model, config):
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    randomise(model, "default")
    return model


def added_by(wrapped, x, height, width, leading):
    """The formula with the grid as it is: 1x1, 3x3, 1x1, each token that is no patch an image of its own."""
    (down, up), kernel = wrapped.inlay_convpass_weight["default"], wrapped.inlay_convpass_kernel["default"]
    b_down, b_kernel, b_up = wrapped.inlay_convpass_bias["default"].split([len(down), len(down), down.shape[1]])
    end = leading + height * width
    h = x @ down.T + b_down
    h = h * torch.sigmoid(1.702 * h)
    convolved = [F.conv2d(h[:, i, :, None, None], kernel, b_kernel, padding=1)[..., 0, 0] for i in range(leading)]
    patches = h[:, leading:end].mT.unflatten(2, (height, width))
    convolved += [*F.conv2d(patches, kernel, b_kernel, padding=1).flatten(2).unbind(2)]
    convolved += [
        F.conv2d(h[:, i, :, None, None], kernel, b_kernel, padding=1)[..., 0, 0] for i in range(end, h.shape[1])
    ]
    h = torch.stack(convolved, 1)
    return (h * torch.sigmoid(1.702 * h)) @ up + b_up


def calls(model, layers):
    """Input and output of each of these layers, and what they give without an adapter, in the next forward."""
    seen = []

    def note(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((module, x.detach(), output[0] if isinstance(output, tuple) else output))

    for layer in layers:
        layer.register_forward_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 8), (3, 5)])
@pytest.mark.parametrize("name", ENCODERS)
def test_any_grid_of_any_encoder(name, height, width):
    """As many tokens lie in a grid of 2 x 8 as in one of 4 x 4."""
    model = attach(encoder(name), ConvPassConfig(width=3))
    more = {"interpolate_pos_encoding": True} if (height, width) != (4, 4) and "Dino" not in name else {}
    layers = [module for module in model.modules() if isinstance(module, ConvPassLayer)]
    assert len(layers) == 6
    seen = calls(model, [layers[3]])  # an MLP
    pixels = torch.randn(2, 3, 4 * height, 4 * width, dtype=torch.float64)
    model(pixel_values=pixels, **more)
    [(wrapped, x, output)] = seen
    leading = ENCODERS[name][2]
    assert x.shape[1] == leading + height * width
    expected = wrapped.base_layer(x) + added_by(wrapped, x, height, width, leading)
    assert (output - expected).abs().max() < 1e-9


def test_a_rectangular_base():
    torch.manual_seed(0)
    base = hf.ViTModel(hf.ViTConfig(**{**IMAGE, "image_size": (8, 24)}), add_pooling_layer=False).double().eval()
    model = attach(base, ConvPassConfig(width=3))
    seen = calls(model, [model.get_base_model().layers[0].mlp])
    model(pixel_values=torch.randn(2, 3, 8, 24, dtype=torch.float64))
    [(wrapped, x, output)] = seen
    assert (output - wrapped.base_layer(x) - added_by(wrapped, x, 2, 6, 1)).abs().max() < 1e-9


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_behind_the_patches_are_no_patches(deep):
    parts = [VisualPromptConfig(length=2, deep=deep), ConvPassConfig(width=3), LoraConfig(target_modules=["fc1"], r=2)]
    model = attach(build("vit").double(), CompositeConfig(parts=parts))
    seen = calls(model, [model.get_base_model().get_submodule("vit.layers.2.base_layer.mlp")])
    model(pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64))
    [(wrapped, x, output)] = seen
    assert x.shape[1] == 1 + 16 + 2
    assert (output - wrapped.base_layer(x) - added_by(wrapped, x, 4, 4, 1)).abs().max() < 1e-9


def test_prompts_and_a_bypass_at_one_attention_of_sam_both_act():
    def adapted(*parts):
        return attach(build("sam").double(), parts[0] if len(parts) == 1 else CompositeConfig(parts=[*parts]))

    both = adapted(VisualPromptConfig(length=2), ConvPassConfig(width=3, sites=["attention"]))
    windows = torch.randn(9, 3, 3, 32, dtype=torch.float64)
    both(pixel_values=torch.randn(1, 3, 32, 32, dtype=torch.float64))
    outer = both.get_base_model().vision_encoder.layers[0].attn
    assert isinstance(outer, ConvPassLayer)
    difference = outer(windows)[0] - outer.base_layer(windows)[0]
    assert difference.abs().max() > 1e-3 and outer.base_layer(windows)[0].shape == windows.shape


def test_what_the_grid_is_taken_from_is_left_as_it_was():
    base = build("vit")
    model = get_peft_model(base, ConvPassConfig(width=3))
    model.add_adapter("second", ConvPassConfig(width=2))
    twin = copy.deepcopy(model)
    embeddings = base.vit.embeddings
    assert len(embeddings._forward_hooks) == 1
    grids = [module._grid for module in twin.modules() if isinstance(module, ConvPassLayer)]
    assert len({id(grid) for grid in grids}) == 1 and grids[0]._embeddings is twin.get_base_model().vit.embeddings
    model.delete_adapter("second")
    assert len(embeddings._forward_hooks) == 1
    model.unload()
    assert not embeddings._forward_hooks and len(twin.get_base_model().vit.embeddings._forward_hooks) == 1


def test_a_layer_called_without_the_images_is_refused():
    model = get_peft_model(build("vit"), ConvPassConfig(width=3))
    with pytest.raises(InlayError, match="call the whole model, with images"):
        model.get_base_model().vit.layers[0].mlp(torch.randn(1, 17, 32))
