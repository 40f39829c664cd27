"""What plain peft saves next to an adapter, or other trainers in its place: right values are those of PeftModel."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inlay import import_adapter, load_adapter, save_adapter
from inlay.adapters.file import CONFIG, WEIGHTS
from inlay.bases.processors import load_tokenizer
from inlay.errors import Unsupported, WrongBase
from inlay.tasks.text.processor import TextProcessor

ROWS, IDS = 40, torch.arange(3, 19)[None]
PATHS = {
    "LoRA on the embedding": (None, {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA on embedding and head": (None, {"target_modules": ["embed_tokens", "lm_head"]}),
    "new tokens, LoRA elsewhere": (ROWS + 4, {"target_modules": ["q_proj"]}),
    "new tokens, LoRA on embedding and head": (ROWS + 4, {"target_modules": ["embed_tokens", "lm_head"]}),
    "new tokens, embedding and head trained whole": (
        ROWS + 4,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "new tokens, head trained whole": (ROWS + 4, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding trained whole": (None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "base"
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, ROWS)}
    plain = Tokenizer(models.WordLevel(words, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=request.param,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_base(folder, rows=None, seed=7):
    base = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    if rows:
        torch.manual_seed(seed)
        base.resize_token_embeddings(rows, mean_resizing=False)
    return base


def train(base, **settings):
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def quiet():
    """peft says which layers it saves, and that tied ones are adapted."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def answer(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("case", PATHS)
def test_an_adapter_with_its_base_s_embedding_loads_as_in_peft(case, llama, tmp_path):
    rows, settings = PATHS[case]
    train(make_base(llama, rows), **settings).save_pretrained(tmp_path / "a")
    right = answer(PeftModel.from_pretrained(make_base(llama, rows), tmp_path / "a"))
    torch.testing.assert_close(answer(load_adapter(tmp_path / "a", make_base(llama, rows)).model), right)
    torch.testing.assert_close(answer(load_adapter(tmp_path / "a").model), right)
    import_adapter(tmp_path / "a", tmp_path / "b")
    torch.testing.assert_close(answer(load_adapter(tmp_path / "b").model), right)


def test_an_embedding_of_another_base_is_not_written_over_a_given_one(llama, tmp_path):
    train(make_base(llama, ROWS + 4), target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    given = make_base(llama, ROWS + 4, seed=8)
    before = {key: value.clone() for key, value in given.state_dict().items()}
    with pytest.raises(
        WrongBase, match=r"carries the embedding of its base \(.*, 44 x 16\), and this base has another"
    ):
        load_adapter(tmp_path / "a", given)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    with pytest.raises(
        WrongBase, match=r"\(.*, 44 x 16\), and this base has another \(40 x 16\); give base= as a name"
    ):
        load_adapter(tmp_path / "a", make_base(llama))


def test_new_rows_of_one_end_only_are_never_made_up(llama, tmp_path):
    model = train(make_base(llama, ROWS + 4), target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "a")
    if model.config.tie_word_embeddings:
        torch.testing.assert_close(answer(load_adapter(tmp_path / "a").model), answer(model))
    else:
        with pytest.raises(WrongBase, match="enlarged to 44 tokens, and its file lacks the new rows of lm_head"):
            load_adapter(tmp_path / "a")


def test_save_adapter_refuses_an_enlarged_vocabulary_that_plain_peft_saves(llama, tmp_path):
    model = train(make_base(llama, ROWS + 4), target_modules=["q_proj"])
    with pytest.raises(Unsupported, match=r"has 44 tokens, that of .* 40, .* model\.save_pretrained"):
        save_adapter(model, tmp_path / "a", processor=TextProcessor(load_tokenizer(llama)))
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(answer(load_adapter(tmp_path / "a").model), answer(model))


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_keys_with_the_name_of_an_adapter_in_them(name, settings, llama, tmp_path):
    model = train(make_base(llama), target_modules=["q_proj", "v_proj"], **settings)
    model.save_pretrained(tmp_path / "a")
    trained = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
    save_file({key.replace(".default", f".{name}"): value for key, value in trained.items()}, tmp_path / "a" / WEIGHTS)
    torch.testing.assert_close(answer(load_adapter(tmp_path / "a").model), answer(model))


@pytest.mark.parametrize("what", ["folder", "file next to its config", "file alone", "safetensors alone"])
def test_peft_s_own_pickle_is_imported(what, llama, tmp_path):
    model = train(make_base(llama), target_modules=["q_proj", "v_proj"], lora_alpha=16)
    model.save_pretrained(tmp_path / "a")
    weights, source, asked = load_file(tmp_path / "a" / WEIGHTS), tmp_path / "a", {}
    if what != "safetensors alone":
        torch.save(weights, tmp_path / "a" / "adapter_model.bin")
        (tmp_path / "a" / WEIGHTS).unlink()
    if what != "folder":
        source = next(path for path in (tmp_path / "a").iterdir() if path.stem == "adapter_model")
    if "alone" in what:
        (tmp_path / "a" / CONFIG).unlink()
        asked = {"base": str(llama), "alpha": 16}
    import_adapter(source, tmp_path / "b", **asked)
    loaded = load_adapter(tmp_path / "b")
    assert loaded.verified
    torch.testing.assert_close(answer(loaded.model), answer(model))


def test_a_pickle_with_code_in_it_is_never_run(llama, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").touch, ())

    train(make_base(llama), target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).unlink()
    torch.save({"base_model.model.x.lora_A.weight": Harm()}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(Unsupported, match="it holds more than tensors"):
        import_adapter(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "harm").exists()


def test_the_folder_of_an_adapter_with_a_name(llama, tmp_path):
    """Plain peft puts an adapter that is not called "default" into a folder of its own."""
    torch.manual_seed(0)
    model = get_peft_model(
        make_base(llama), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="mine"
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(Exception, match=r"it has no adapter_config\.json; adapters in it: mine"):
        load_adapter(tmp_path / "a")
    assert load_adapter(tmp_path / "a" / "mine").model
