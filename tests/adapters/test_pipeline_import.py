"""LoRAs of a pipeline as other programs write them: each adds ΔW = alpha / r · B·A, computed here in float64."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_models import write_pipeline
from inlay import combine, import_adapter, load_adapter, load_base
from inlay.adapters.convert.pipelines import _name_layers_of_kohya
from inlay.adapters.file import read_adapter
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, SETTINGS, find_weights
from inlay.errors import InlayError
from places import SHARED

FILES = SHARED / "lora_checkpoints"
PIPELINE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("bases") / "sd")


@pytest.fixture(scope="module")
def layers(base):
    """Linear layers and convolutions of the UNet and the text encoder, by name."""
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name: module
        for name, module in load_base(base).named_modules()
        if isinstance(module, kinds) and not name.startswith("vae")
    }


def draw(layer, rank, seed):
    """A and B of a layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.weight.shape
    ones = (1,) * (len(shape) - 2)
    return (
        torch.randn(rank, *shape[1:], generator=generator),
        torch.randn(shape[0], rank, *ones, generator=generator),
    )


def multiply(down, up, scale):
    """ΔW in float64, of a convolution as its kernel."""
    flat = scale * up.double().flatten(1) @ down.double().flatten(1)
    return flat.reshape(len(up), *down.shape[1:])


def measure(down, up):
    """The Frobenius norm of B·A, from products of r x r."""
    return ((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum().sqrt()


def check(folder, base, wanted):
    """The effect of an adapter on every weight of its base: these differences, and no others."""
    model = load_adapter(folder, base).model.get_base_model()
    found = {name: m.get_delta_weight("default") for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)


def test_kohya(base, layers, tmp_path):
    """As `LoRAModule` of sd-scripts: layers of Transformer2DModel, ResnetBlock2D and CLIP's, with an alpha each."""
    tensors, wanted = {}, {}
    for i, (name, layer) in enumerate(layers.items()):
        if not re.search("attentions|resnets|layers", name) or name.endswith("conv_shortcut"):
            continue
        rank, alpha = 1 + i % 3, 0.5 + i % 4
        down, up = draw(layer, rank, i)
        part, _, inner = name.partition(".")
        start = "lora_unet_" if part == "unet" else "lora_te_text_model_"  # of transformers 4
        key = start + inner.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        wanted[name] = multiply(down, up, alpha / rank)
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(InlayError, match="holds the alpha of each layer"):
        import_adapter(tmp_path / "kohya.safetensors", tmp_path / "out", base=PIPELINE, alpha=4)
    made = import_adapter(tmp_path / "kohya.safetensors", tmp_path / "out", base=PIPELINE)
    assert made.form == "kohya" and made.layers == len(wanted) > 40
    check(made.folder, base, wanted)


def name_in_code_of_stability(name, count, last):
    """As `make_unet_conversion_map` of sd-scripts, which follows the original code: all blocks in one list."""
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    whole = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    name = whole.get(name, name)
    for i, (time, label) in enumerate([("time_embed.0", "label_emb.0.0"), ("time_embed.2", "label_emb.0.2")], 1):
        name = name.replace(f"time_embedding.linear_{i}", time).replace(f"add_embedding.linear_{i}", label)
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name)
    if not match:
        return name
    side, block, kind, layer, rest = match.groups()
    block, layer = int(block or 0), int(layer)
    rest = {**inner, "conv_shortcut": "skip_connection"}.get(rest, rest) if kind == "resnets" else rest
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if side == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(count + 1) * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(count + 1) * block + count}.{1 if block == last else 2}.conv"
    if side == "down":
        return f"input_blocks.{(count + 1) * block + layer + 1}.{place}.{rest}"
    return f"output_blocks.{(count + 1) * block + layer}.{place}.{rest}"


def test_every_name_of_kohyas_sdxl(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
            transformer_layers_per_block=[1, 2, 3], use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=8,
        )  # fmt: skip
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    asked = {f"lora_unet_{name_in_code_of_stability(name, 2, 2)}".replace(".", "_"): f"unet.{name}" for name in names}
    layers = "encoder_layers_3_self_attn_out_proj"
    asked |= {f"lora_te{i}_text_model_{layers}": None for i in (1, 2)}
    found = _name_layers_of_kohya(tmp_path, asked, None)
    assert len(asked) == len(names) + 2 > 300
    assert found.pop(f"lora_te1_text_model_{layers}") == "text_encoder.text_model.encoder.layers.3.self_attn.out_proj"
    assert found.pop(f"lora_te2_text_model_{layers}") == "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj"
    assert all(found[key] == asked[key] for key in found)
    names = [
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_unet_output_blocks_9_0_op",
    ]
    with pytest.raises(InlayError, match="has 2 layers that neither Stable Diffusion nor SDXL has"):
        _name_layers_of_kohya(tmp_path, names, None)


def number_layers(model, classes):
    """As `_find_modules_v2` of lora_diffusion: linear layers in modules of these classes, one after the other."""
    names = {id(module): name for name, module in model.named_modules()}
    for ancestor in model.modules():
        if type(ancestor).__name__ in classes:
            for module in ancestor.modules():
                if isinstance(module, nn.Linear):
                    yield names[id(module)], module


@pytest.mark.parametrize("old", [True, False])
def test_cloneofsimo(old, base, tmp_path):
    """ΔW = up·down; in the diffusers of its day the feed-forward layers stood before the second attention."""
    model = load_base(base)
    for block in model.modules():
        if old and type(block).__name__ == "BasicTransformerBlock":
            block._modules["attn2"] = block._modules.pop("attn2")
    tensors, metadata, wanted = {}, {}, {}
    for part, classes in (("unet", ["CrossAttention", "Attention", "GEGLU"]), ("text_encoder", ["CLIPAttention"])):
        metadata[part] = json.dumps(classes)
        for i, (name, layer) in enumerate(number_layers(getattr(model, part), classes)):
            down, up = draw(layer, 2, i)
            tensors |= {f"{part}:{i}:down": down, f"{part}:{i}:up": up}
            wanted[f"{part}.{name}"] = multiply(down, up, 1)
    save_file({**tensors, "<s1>": torch.ones(16)}, tmp_path / "x.safetensors", metadata)
    made = import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=str(base))
    assert (made.form, made.checked) == ("cloneofsimo", "its base's weights")
    assert made.left_out == ["1 other tensors (<s1>)"]
    check(made.folder, base, wanted)


@pytest.mark.parametrize("start", ["unet.", ""])
def test_attention_processors_of_diffusers(start, base, layers, tmp_path):
    """LoRAAttnProcessor: ΔW = up·down, with or without the name of the part; no alpha is needed."""
    tensors, wanted = {}, {}
    for i, name in enumerate(name for name in layers if re.search(r"unet.*(to_[qkv]|to_out\.0)$", name)):
        down, up = draw(layers[name], 2, i)
        block, _, layer = name.removeprefix("unet.").removesuffix(".0").rpartition(".")
        key = f"{start}{block}.processor.{layer}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        wanted[name] = multiply(down, up, 1)
    save_file(tensors, tmp_path / "x.safetensors")
    check(import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE).folder, base, wanted)


def test_mixed_keys_of_diffusers_scripts(base, layers, tmp_path):
    """Their converter renames the layers of attention, not the convolutions; without settings alpha is asked for."""
    tensors, wanted = {}, {}
    names = [name for name in layers if re.search(r"(to_[qk]|to_out\.0|conv1|conv_in|fc1|q_proj)$", name)]
    for i, name in enumerate(names):
        down, up = draw(layers[name], 2, i)
        part, _, inner = name.partition(".")
        own = convert_state_dict_to_diffusers({f"{inner}.lora_A.weight": down, f"{inner}.lora_B.weight": up})
        tensors |= {f"{part}.{key}": value for key, value in own.items()}
        wanted[name] = multiply(down, up, 3 / 2)
    assert any(".to_q.lora.down." in key for key in tensors) and any(".conv1.lora_A." in key for key in tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InlayError, match="which lacks alpha"):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE)
    made = import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE, alpha=3)
    assert made.form.startswith("diffusers, with keys of two kinds")
    check(made.folder, base, wanted)


def test_dora_of_kohya(base, layers, tmp_path):
    """W' = m · (W + ΔW) / ‖W + ΔW‖ by rows (Liu et al. 2024, equation 5)."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    conv = "unet.down_blocks.1.resnets.0.conv1"
    tensors, wanted = {}, {}
    for i, layer in enumerate((name, conv)):
        down, up = draw(layers[layer], 2, i)
        rows = torch.rand(len(up), *(1,) * (up.ndim - 1), generator=torch.Generator().manual_seed(i)) + 0.5
        key = f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": rows}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        whole = layers[layer].weight.double() + multiply(down, up, 1 / 2)
        norms = whole.flatten(1).norm(dim=1).reshape(rows.shape)
        wanted[layer] = rows.double() * whole / norms
    save_file(tensors, tmp_path / "x.safetensors")
    made = import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE)
    merged = load_adapter(made.folder, base).model.merge_and_unload()
    for layer, value in wanted.items():
        torch.testing.assert_close(merged.get_submodule(layer).weight.double(), value, rtol=1e-5, atol=1e-5)
    save_file({**tensors, f"{key}.dora_scale": torch.ones(1, 8, 1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(InlayError, match="has magnitudes for the columns"):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "no", base=PIPELINE)
    del tensors[f"{key}.dora_scale"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InlayError, match=f"lacks the magnitudes of {conv}"):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "no", base=PIPELINE)


def test_a_unet_that_peft_has_saved_by_itself(base, tmp_path):
    """pipe.load_lora_weights takes nothing of such a folder; here it is the pipeline's."""
    unet = get_peft_model(
        load_base(base).unet, LoraConfig(r=2, target_modules=["to_q"], rank_pattern={"attn2.to_q": 3})
    )
    torch.manual_seed(0)
    wanted = {}
    for name, module in unet.get_base_model().named_modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight)
            wanted[f"unet.{name}"] = module.get_delta_weight("default").double()
    unet.save_pretrained(tmp_path / "peft")
    made = import_adapter(tmp_path / "peft", tmp_path / "out", base=str(base))
    assert (made.checked, find_weights(made.folder).name) == ("its base's weights", PIPELINE_WEIGHTS)
    check(made.folder, base, wanted)


def test_alphas_between_the_keys_of_diffusers(tmp_path):
    """Some programs put kohya's `.alpha` next to diffusers' names."""
    one, two = "unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    tensors = {f"{one}.lora.down.weight": down, f"{one}.lora.up.weight": up, f"{one}.alpha": torch.tensor(6.0)}
    tensors |= {f"{two}.lora_linear_layer.{x}.weight": value for x, value in (("down", down), ("up", up))}
    tensors[f"{two}.lora_linear_layer.alpha"] = torch.tensor(3.0)
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    config = read_adapter(import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE).folder).config
    assert config["lora_alpha"] == 6 and list(config["alpha_pattern"].values()) == [3]
    tensors[f"{one}.lora_A.weight"] = down
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InlayError, match="one tensor of its unet under two names"):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "no", base=PIPELINE)


def test_a_repository_of_diffusers_on_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    repository = tmp_path / "cache" / "models--user--lora"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    pair = {f"unet.conv_in.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    told = {SETTINGS: json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    save_file(pair, repository / "snapshots" / "0123" / PIPELINE_WEIGHTS, told)
    made = import_adapter("user/lora", tmp_path / "out", base=PIPELINE)
    assert read_adapter(made.folder).config["lora_alpha"] == 6


def test_settings_of_one_part_do_not_count_for_another(tmp_path):
    """Without settings for the text encoder, diffusers takes r = alpha = 8 for it."""
    one, two = "unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{name}.lora_{x}.weight": torch.ones(2, 2) for name in (one, two) for x in "AB"}
    told = {SETTINGS: json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"proj_in": 4}})}
    save_file(tensors, tmp_path / "x.safetensors", told)
    with pytest.raises(InlayError, match="which lacks alpha"):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE)
    made = import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE, alpha=3)
    assert made.checked == "nothing: its base is not at hand"
    config = read_adapter(tmp_path / "out").config
    assert config["target_modules"] == ["text_encoder.encoder.layers.0.mlp.fc1", one]
    assert config["lora_alpha"] == 4 and config["alpha_pattern"] == {re.escape(config["target_modules"][0]): 3}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "holds LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "holds LoKr"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
        ("lora_unet_conv_in.diff", "differences of whole weights"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "which neither a UNet nor CLIP's"),
        ("unet:0:down", "does not say in its metadata of which modules"),
        ("unet.conv_in.lora_A.weight", "does not hold two matrices, or two kernels, for unet.conv_in"),
    ],
)
def test_what_is_refused(key, message, tmp_path):
    other = key.replace("down", "up")
    save_file({key: torch.ones(2, 2), other: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(InlayError, match=message):
        import_adapter(tmp_path / "x.safetensors", tmp_path / "out", base=PIPELINE)
    assert not (tmp_path / "out").exists()


def real_file(name):
    if not (FILES / name).is_file():
        pytest.skip(f"the real file {name} is not here")
    return FILES / name


@pytest.mark.parametrize("name", ["lora_disney.safetensors", "analog_svd_rank4.safetensors"])
def test_real_files_come_in_whole_without_their_base(name, tmp_path):
    """144 layers of the UNet and 48 of the text encoder: the names are those whose layers have these shapes."""
    tensors = load_file(real_file(name))
    with pytest.raises(InlayError, match=r"lacks the name of its base: --base \(that of the whole pipeline"):
        import_adapter(FILES / name, tmp_path / "out")
    made = import_adapter(FILES / name, tmp_path / "out", base=PIPELINE)
    assert (made.layers, made.renamed, made.checked) == (192, 384, "nothing: its base is not at hand")
    assert made.left_out == (["2 other tensors (<s1>, <s2>)"] if "<s1>" in tensors else [])
    stored = load_file(made.folder / PIPELINE_WEIGHTS)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    for key, down in stored.items():
        if key.startswith("unet.") and ".lora_A." in key:
            up = stored[key.replace("lora_A", "lora_B")]
            layer = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
            assert layer.weight.shape == (len(up), down.shape[1])
    for part, count in (("unet", 144), ("text_encoder", 48)):
        wanted = [measure(tensors[f"{part}:{i}:down"], tensors[f"{part}:{i}:up"]) for i in range(count)]
        pairs = [key for key in stored if key.startswith(f"{part}.") and ".lora_A." in key]
        found = [measure(stored[key], stored[key.replace("lora_A", "lora_B")]) for key in pairs]
        torch.testing.assert_close(torch.stack(found).sort()[0], torch.stack(wanted).sort()[0])


def test_two_real_files_are_added_and_written_back(tmp_path):
    files = {name: real_file(f"{name}.safetensors") for name in ("lora_disney", "analog_svd_rank4")}
    for name, path in files.items():
        import_adapter(path, tmp_path / name, base=PIPELINE)
    made = combine({tmp_path / "lora_disney": 1, tmp_path / "analog_svd_rank4": -0.5}, out=tmp_path / "sum")
    assert made.widths == {"LORA": 5} and made.error == 0
    one, two, both = (load_file(tmp_path / name / PIPELINE_WEIGHTS) for name in (*files, "sum"))
    assert both.keys() == one.keys() == two.keys() and len(both) == 384
    for key in both:
        if ".lora_A." in key:
            found, first, second = (multiply(f[key], f[key.replace("lora_A", "lora_B")], 1) for f in (both, one, two))
            torch.testing.assert_close(found, first - 0.5 * second)
