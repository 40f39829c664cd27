"""Adapters from strangers: what a folder could be made to do, and that it does not."""

import ast
import json
import os
import shutil
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from command import run
from inlay import Bank, load_adapter, load_base, read_adapter
from inlay.adapters import config as rules
from inlay.adapters import file as files
from inlay.adapters import patterns
from inlay.adapters.file import CONFIG, METRICS, WEIGHTS
from inlay.adapters.hub.fetch import fetch
from inlay.bases.load import resolve_base
from inlay.errors import InlayError
from inlay.files import tensor_header as header
from inlay.methods._peft import PeftType, base_modules, inject_empty_adapter
from places import ROOT

A = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"


def refused(folder, message, **options):
    with pytest.raises(InlayError, match=message) as caught:
        load_adapter(folder, **options)
    assert "\n" not in str(caught.value)


def held(base):
    return {f"{n}.{k}": p.clone() for n, m in base_modules(base) for k, p in m._parameters.items() if p is not None}


# limits, before memory is taken


def test_limits_come_before_memory(zoo, plain, monkeypatch):
    data = (zoo / WEIGHTS).read_bytes()
    monkeypatch.setattr(header, "MAX_HEADER", 1000)
    refused(zoo, r"has a header of [\d,]+ bytes, and inlay reads at most 1,000")
    monkeypatch.undo()
    monkeypatch.setattr(header, "MAX_TENSORS", 10)
    refused(zoo, r"it claims 50 tensors, and inlay reads at most 10")
    monkeypatch.undo()
    for name, limit in files.MAX_BYTES.items():
        kept = (zoo / name).read_bytes()
        os.truncate(zoo / name, limit + 1)  # sparse: no bytes are written
        started = time.process_time()
        refused(zoo, rf"{name} has {limit + 1:,} bytes, and inlay reads at most {limit:,}")
        assert time.process_time() - started < 1
        (zoo / name).write_bytes(kept)
    assert (zoo / WEIGHTS).read_bytes() == data and load_adapter(zoo).verified


def test_shapes_of_many_axes_are_not_multiplied(zoo, plain):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**18] * 200_000, "data_offsets": [0, 4]}}).encode()
    plain(zoo)
    (zoo / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    started = time.process_time()
    refused(zoo, "does not describe the tensor 'a'")
    assert time.process_time() - started < 2


def test_more_labels_than_a_head_has_room_for(zoo, rewrite):
    rewrite(zoo, record=lambda r: r.update(labels=[str(i) for i in range(100_001)]))
    refused(zoo, "names 100,001 labels, and inlay reads at most 100,000")


def test_a_picture_of_a_million_pixels_a_side(zoo, rewrite):
    rewrite(zoo, record=lambda r: r["preprocessing"].update(size={"height": 10**6, "width": 10**6}))
    refused(zoo, "asks for 1000000 pixels a side; expected at most 8192")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERA", "r": 2_000_000}, "r = 2000000, but no tensor of its file has more than 384 rows"),
        ({"peft_type": "INLAY_CONVPASS", "width": 200_000}, "width = 200000, but no tensor of its file has more than"),
        ({"peft_type": "LOHA", "r": 2_000_000}, "r = 2000000, but no tensor of its file has more than 384 rows"),
        ({"peft_type": "LORA", "r": 2_000_000}, r"should be \(2000000, 96\), the file has \(4, 96\)"),
    ],
)
def test_a_huge_rank(settings, message, zoo, plain, five):
    def change(config):
        if settings["peft_type"] != "LORA":
            config.clear()
            config["target_modules"] = ["q_proj"]
        config.update(settings)

    plain(zoo, change)
    started = time.perf_counter()
    refused(zoo, message, base=five)
    assert time.perf_counter() - started < 60  # without the limit it would be years


def test_a_huge_prompt_is_compared_before_it_is_made(tmp_path):
    folder = tmp_path / "prompt"
    folder.mkdir()
    settings = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 10**9}
    (folder / CONFIG).write_text(json.dumps({**settings, "base_model_name_or_path": "builtin:gpt2-tiny"}))
    save_file({"prompt_embeddings": torch.zeros(4, 8)}, folder / WEIGHTS)
    refused(
        folder, r"expected one tensor prompt_embeddings of 1000000000 virtual tokens, got prompt_embeddings \(4, 8\)"
    )


# files that leave the folder, and names that mean two things


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, METRICS, "README.md"])
def test_a_link_out_of_the_folder(name, zoo, tmp_path):
    (zoo / name).rename(tmp_path / "secret")
    (zoo / name).symlink_to(tmp_path / "secret")
    refused(zoo, f"{name} is a link to a file outside of the folder; put the file itself there")


def test_a_link_within_the_folder_and_the_hubs_cache(zoo, tmp_path):
    (zoo / WEIGHTS).rename(zoo / "data")
    (zoo / WEIGHTS).symlink_to("data")
    assert load_adapter(zoo).verified
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS, METRICS):
        shutil.copy(zoo / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_adapter(snapshot).verified
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(zoo / CONFIG)
    refused(snapshot, f"{CONFIG} is a link to a file outside")


def test_a_pipe_is_no_file(zoo):
    (zoo / CONFIG).unlink()
    os.mkfifo(zoo / CONFIG)
    refused(zoo, "is not an adapter: it has no adapter_config.json")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A Hub cache with user/name in it, and a folder of that name to work in."""
    from huggingface_hub import constants, file_download

    cache = tmp_path / "cache"
    snapshot = cache / "models--user--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, "config.json"):
        (snapshot / name).write_text("{}")
    refs = cache / "models--user--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(cache), raising=False)
    (tmp_path / "work" / "user").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / "user" / "name"


def test_a_folder_that_shadows_a_hub_id(cached, zoo):
    shutil.copytree(zoo, cached)
    refused(
        "user/name", r"'user/name' is a folder here and a repository from the Hub in the cache; write './user/name'"
    )
    assert load_adapter("./user/name").verified and load_adapter(cached).verified
    refused("user/name", "revision 'main' needs a Hub id, but 'user/name' is a folder here", revision="main")
    shutil.copytree(zoo, cached.parent / "other")
    assert str(fetch("user/other")) == "user/other"  # nothing of that name is known from the Hub


def test_a_folder_that_shadows_the_base(cached):
    cached.mkdir()
    (cached / "config.json").write_text("{}")
    with pytest.raises(InlayError, match="'user/name' is a folder here and a repository from the Hub"):
        resolve_base("user/name")


def test_info_says_where_it_read(zoo, capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "info", zoo, "--json")
    assert status == 0 and json.loads(out)["folder"] == str(zoo)


# code and other files that a config names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "sets megatron_config, which makes peft import"),
        ({"layer_replication": [[0, 4], [0, 4]]}, "sets layer_replication, which builds a base with more blocks"),
        ({"arrow_config": {"top_k": 2}}, "sets arrow_config, which routes between other adapters"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "asks for code from a repository"),
        ({"trust_remote_code": True}, "asks for code from a repository"),
        ({"peft_type": "XLORA"}, "of the method XLORA, which loads other adapters that its config names"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "MULTITASK_PROMPT_TUNING, which reads a file that its config names"),
        ({"peft_type": "SHADOW"}, "of the method SHADOW, which loads a second model"),
        ({"peft_type": "CPT"}, "of peft's method 'CPT', of which inlay does not know"),
        ({"lora_alpha": 1e9}, r"lora_alpha = 1e\+09; expected at most 1e\+06"),
        ({"alpha_pattern": {"q_proj": -1e9}}, r"alpha_pattern.q_proj = -1e\+09; expected at most"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, which is not a number"),
        ({"lora_dropout": float("inf")}, "lora_dropout = inf, which is not a number"),
        ({"init_lora_weights": "magic"}, "names the unknown initialisation 'magic'"),
        ({"parts": [{"r": 4}]}, "has parts or modules_to_save of a wrong kind"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("signed", [False, True])
def test_a_config_that_asks_for_harm(signed, settings, message, zoo, plain, rewrite, five):
    before = held(five)
    if signed:
        rewrite(zoo, config=lambda c: c.update(settings))
    else:
        plain(zoo, lambda c: c.update(settings))
    refused(zoo, message, base=five)
    after = held(five)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("settings", "effect"),
    [({"auto_map": {"AutoConfig": "evil.C"}}, False), ({"use_rslora": "false"}, True), ({"use_new_scaling": 3}, False)],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_setting_that_peft_would_drop_or_misread(settings, effect, zoo, plain, rewrite, five, original, outputs):
    """A stored output tells whether it matters; without one nothing does."""
    rewrite(zoo, config=lambda c: c.update(settings))
    if effect:
        refused(zoo, "its output differs")
    else:
        torch.testing.assert_close(outputs(load_adapter(zoo).model), outputs(original[0]), rtol=0, atol=0)
    name = next(iter(settings))
    refused(plain(zoo), f"sets {name}, which this peft does not know in LORA or would misread", base=five)


def test_nothing_that_a_config_names_is_imported(zoo, plain, five, tmp_path, monkeypatch):
    (tmp_path / "evil_library.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"base_model_class": "ViTForImageClassification", "parent_library": "evil_library"}
    plain(zoo, lambda c: c.update(auto_mapping=named, megatron_core="evil_library"))
    assert load_adapter(zoo, five).verified is False and "evil_library" not in sys.modules


def test_no_line_of_the_package_runs_what_it_reads():
    """No pickle but through torch's reader of tensors, no code from a repository; joblib only starts processes."""
    asked = {"from_pretrained": "trust_remote_code", "from_config": "trust_remote_code"}
    own = ("PeftConfig", "PeftModel", "json")  # read no code
    # calls classes that diffusers and transformers export, never an auto class, which would look for code
    concrete = ROOT / "src/inlay/bases/diffusion/model.py"
    calls = 0
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module, names = getattr(node, "module", None), {alias.name for alias in node.names}
                assert not {"pickle", "dill", "cloudpickle"} & {module, *names}, path
                assert "joblib" not in names and (module != "joblib" or not {"load", "dump"} & names), path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, keywords = ast.unparse(node.func.value), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if node.func.attr in asked and path == concrete:
                assert "Auto" not in owner, node.lineno
            elif node.func.attr in asked and owner not in own:
                assert keywords.get("trust_remote_code") == "False", (path, node.lineno)
                calls += 1
            if (owner, node.func.attr) == ("torch", "load"):
                assert keywords.get("weights_only") == "True", (path, node.lineno)
            if (owner, node.func.attr) == ("np", "load"):
                assert keywords.get("allow_pickle") == "False", (path, node.lineno)
    assert calls >= 5


def test_a_setting_that_stands_twice(zoo, plain):
    text = (plain(zoo) / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 8, "lora_alpha": 16')
    (zoo / CONFIG).write_text(text)
    refused(zoo, "names a tensor or a setting twice")


def test_a_config_that_is_an_lfs_pointer(zoo):
    (zoo / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    refused(zoo, "it is a Git LFS pointer: run `git lfs pull`")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(auto_map={"AutoConfig": "code.C"}, model_type="evil"), "needs code|evil"),
        (lambda c: c.update(attn_implementation="evil/attention"), "attention code 'evil/attention' from the Hub"),
    ],
)
def test_a_base_that_brings_code(change, message, tmp_path):
    folder = shutil.copytree(resolve_base("builtin:vit-tiny"), tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(InlayError, match=message):
        load_base(folder)


# what changes the base


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("composite", [False, True])
def test_an_initialisation_that_changes_the_base(init, composite, zoo, plain, five):
    def change(config):
        config["init_lora_weights"] = init
        if composite:
            part = {k: v for k, v in config.items() if k != "modules_to_save"}
            other = {"peft_type": "INLAY_VISUAL_PROMPT", "length": 2}
            config.clear()
            config.update(peft_type="INLAY_COMPOSITE", parts=[part, other], base_model_name_or_path="builtin:vit-tiny")

    before = held(five)
    refused(plain(zoo, change), f"initialised by '{init}', which changes the base at each load", base=five)
    assert all(torch.equal(value, held(five)[key]) for key, value in before.items())


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", "mica"])
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is .eva. but")
def test_other_initialisations_load_and_leave_the_base(init, zoo, plain, original, outputs, five):
    before = held(five)
    loaded = load_adapter(plain(zoo, lambda c: c.update(init_lora_weights=init)), five)
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=0)
    after = held(loaded.model)
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_methods_of_peft_are_known_or_refused():
    known = {name for name in PeftType.__members__ if rules.is_audited(name)}
    assert {"LORA", "IA3", "LOHA", "PROMPT_TUNING", "INLAY_BOTTLENECK"} <= known
    assert not known & {"XLORA", "MULTITASK_PROMPT_TUNING", "SHADOW", "OSF", "CPT", "POLY", "CARTRIDGE"}


@pytest.mark.parametrize(
    "name", sorted(rules.AUDITED - {"P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "TRAINABLE_TOKENS"})
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # LN_TUNING takes any
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # BOFT does without
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
def test_an_audited_method_leaves_the_base(name):
    special = {
        "C3A": {"block_size": 8},
        "FOURIERFT": {"n_frequency": 50},
        "IA3": {"feedforward_modules": []},
        "LN_TUNING": {"target_modules": ["layernorm_before"]},
        "ROAD": {"group_size": 32},
        "VBLORA": {"vector_length": 8},
        "ADALORA": {"total_step": 10},
    }
    base = load_base("builtin:vit-tiny")
    before = held(base)
    settings = {"target_modules": ["q_proj"], **special.get(name, {})}
    after = held(inject_empty_adapter(base, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**settings)))
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)


def test_biases_of_the_base(make, processor, outputs, five, tmp_path):
    model = make(bias="all")
    from inlay import save_adapter

    folder = save_adapter(model, tmp_path / "biased", processor=processor)
    before = held(five)
    refused(folder, r"trained with bias='all': its file replaces biases of the base itself", base=five)
    assert all(torch.equal(value, held(five)[key]) for key, value in before.items())
    with pytest.raises(InlayError, match="replaces biases of the base itself"):
        Bank(five, [folder])
    torch.testing.assert_close(outputs(load_adapter(folder).model), outputs(model), rtol=0, atol=0)  # a base of its own


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.vit.embeddings.cls_token",
        "base_model.model.vit.layers.0.attention.q_proj.base_layer.weight",
        "base_model.model.vit.layers.0.attention.q_proj.weight",
        "base_model.model.classifier.original_module.weight",
        "vit.embeddings.cls_token",
    ],
)
def test_a_key_that_would_overwrite_the_base(key, zoo, plain, five):
    plain(zoo)
    tensors = load_file(zoo / WEIGHTS)
    save_file({**tensors, key: torch.ones(1, 1, 96)}, zoo / WEIGHTS)
    before = held(five)
    refused(zoo, r"has 1 that no module takes", base=five)
    assert all(torch.equal(value, held(five)[key]) for key, value in before.items())


def test_a_file_that_holds_a_second_adapter(zoo, plain):
    plain(zoo)
    key = "base_model.model.vit.layers.0.attention.q_proj.lora_A.other.weight"
    save_file({**load_file(zoo / WEIGHTS), key: torch.ones(1, 1, 96)}, zoo / WEIGHTS)
    refused(zoo, r"the file of adapter 'zoo' holds several adapters")


def test_a_second_adapter_on_one_base(zoo, original, make):
    refused(zoo, "carries an adapter already", base=get_peft_model(load_base("builtin:vit-tiny"), LoraConfig(
        target_modules=["q_proj"])).get_base_model())  # fmt: skip


def test_labels_of_its_own_without_a_head(zoo, rewrite):
    def headless(tensors):
        for key in [key for key in tensors if "classifier" in key]:
            del tensors[key]

    def unchecked(record):
        record["golden"] = []

    rewrite(zoo, weights=headless, record=unchecked, config=lambda c: c.update(modules_to_save=None))
    refused(zoo, r"has labels that are not its base's, but lacks a head \('classifier'\)")


# patterns


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"(\w|\w\w|.)+!"},
        {"target_modules": r"(.*)*.*\.q_projx"},
        {"exclude_modules": r"([a-z._0-9]+)+!"},
        {"alpha_pattern": {r"([a-z._0-9]+)+!": 3}},
        {"rank_pattern": {r"(a|.|\w)+!": 3}},
        {"layers_pattern": [r"(\w|.)+!"], "layers_to_transform": [0]},
        {"modules_to_save": [r"(\w|.)+!"]},
    ],
)
def test_a_pattern_that_would_run_for_ever(settings, zoo, plain, five, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    plain(zoo, lambda c: c.update(settings))
    started = time.perf_counter()
    refused(zoo, r"a pattern in the config of adapter 'zoo' did not finish on .* module names after 0.5 s", base=five)
    assert time.perf_counter() - started < 60  # without the limit it would be years


def test_a_pattern_that_would_run_for_ever_in_combine(zoo, plain, tmp_path, monkeypatch):
    from inlay import combine

    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    plain(zoo, lambda c: c.update(alpha_pattern={r"([a-z._0-9]+)+!": 3}))
    with pytest.raises(InlayError, match="a pattern in the config of adapter 'zoo' did not finish"):
        combine({zoo: 1.0}, out=tmp_path / "out")


def test_patterns_in_use_are_taken(zoo, plain, original, outputs, five):
    usual = r"(?:.*?(?:language|layers).*?(?:self_attn|attention|mlp|ffn).*?(?:q_proj|k_proj|v_proj|o_proj|fc1|fc2).*?)"
    loaded = load_adapter(plain(zoo, lambda c: c.update(target_modules=usual)), five)
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=0)


def test_a_long_pattern(zoo, plain):
    plain(zoo, lambda c: c.update(target_modules="(a|b)" * 3000))
    refused(zoo, "has 15,000 characters, and inlay tries at most 10,000")


def test_names_without_repeats_take_no_process(zoo, monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert load_adapter(zoo).verified


# what reaches the terminal


def test_control_characters_do_not_reach_the_terminal(zoo, rewrite, capsys, monkeypatch):
    rewrite(zoo, record=lambda r: r["labels"].__setitem__(0, "\x1b]0;owned\x07cat"))
    (zoo / METRICS).write_text(json.dumps({"dataset": "\x1b[2Jdigits"}))
    status, out, _ = run(capsys, monkeypatch, "info", zoo)
    assert status == 0 and "cat" in out and "digits" in out and "\x1b" not in out and "\x07" not in out
    rewrite(zoo, record=lambda r: r["base"].update(name="/\x1b[2Jnowhere"))
    status, out, err = run(capsys, monkeypatch, "info", zoo, "--base", "/\x1b[2Jnowhere")
    assert status == 2 and "nowhere" in err and "\x1b" not in err


def test_read_adapter_needs_no_peft(zoo):
    import subprocess

    code = f"import sys\nfrom inlay.adapters.file import read_adapter\nread_adapter({str(zoo)!r})\n" \
           "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert read_adapter(zoo).record
