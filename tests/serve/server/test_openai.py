"""OpenAI's routes, asked by OpenAI's own client over a socket."""

import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from inlay import Bank, Decoding, generate, load_adapter
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from serve.banked import GPT2, VIT, save

PROMPT = "name[The Eagle], food[Italian]"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save(GPT2, ("lora", 4), folder / "lora", std=0.2)
    save(GPT2, ("prompt", 3), folder / "prompt", seed=2, std=0.2)
    save(VIT, ("lora", 2), folder / "images")
    return folder


@pytest.fixture(scope="module")
def service(folder):
    bank = Bank(GPT2, folder, skip_unfit=True)
    for name in ("lora", "prompt"):
        bank.load_processor(bank.read_file(name)).tokenizer.chat_template = CHAT
    return Service(bank, ServiceConfig(max_batch=8, max_tokens=100, max_new_tokens=200))


@pytest.fixture(scope="module")
def client(service):
    """OpenAI's, of a server in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def adapters(folder):
    return {name: load_adapter(folder / name) for name in ("lora", "prompt")}


def complete(client, model="lora", prompt=PROMPT, **more):
    return client.completions.create(model=model, prompt=prompt, **{"max_tokens": 12, "temperature": 0, **more})


@pytest.mark.parametrize("name", ["lora", "prompt"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft of its prompts
def test_a_completion_is_what_the_adapter_writes_alone(client, adapters, name, service):
    found = complete(client, name)
    wanted = generate(adapters[name].model, adapters[name].processor, [PROMPT], Decoding(max_new_tokens=12))
    assert [found.choices[0].text.strip()] == wanted
    assert (found.object, found.model, found.choices[0].finish_reason) == ("text_completion", name, "length")
    ids = adapters[name].processor.encode_prompt(PROMPT)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 12)
    digest = service.bank.read_file(name).digest
    assert found.system_fingerprint == f"{digest}-{service.base_digest}"
    assert (found.adapter_digest, found.base_digest, found.base) == (digest, service.base_digest, GPT2)


def test_the_open_inference_protocol_gives_the_same_text(client):
    values = {"prompt": ("BYTES", [PROMPT, "name[Zizzi]"]), "max_tokens": ("INT32", [12, 3])}
    inputs = [{"name": name, "datatype": kind, "shape": [2, 1], "data": data} for name, (kind, data) in values.items()]
    url = f"http://{client.base_url.host}:{client.base_url.port}/v2/models/lora/infer"
    (text,) = httpx.post(url, json={"inputs": inputs}).json()["outputs"]
    expected = [complete(client), complete(client, prompt="name[Zizzi]", max_tokens=3)]
    assert text["shape"] == [2, 1] and text["data"] == [each.choices[0].text for each in expected]


def test_pieces_of_a_stream_make_the_text(client):
    whole = complete(client, n=2)
    chunks = list(complete(client, n=2, stream=True, stream_options={"include_usage": True}))
    for i in (0, 1):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert len(own) > 4
        assert "".join(part.text for part in own) == whole.choices[i].text
        assert [part.finish_reason for part in own][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_several_prompts_as_texts_and_as_tokens(client, adapters):
    texts = ["a", "name[Aromi], area[riverside]"]
    tokens = adapters["lora"].processor.encode_prompts(texts)
    found = complete(client, prompt=texts, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == sum(map(len, tokens)) and found.usage.completion_tokens == 48
    by_tokens = complete(client, prompt=tokens)
    assert [choice.text for choice in by_tokens.choices] == [found.choices[0].text, found.choices[2].text]
    assert complete(client, prompt=tokens[1]).choices[0].text == found.choices[2].text
    assert complete(client, prompt=texts[1], echo=True).choices[0].text == texts[1] + found.choices[2].text


def test_a_chat_is_written_by_the_template(client, adapters):
    messages = [{"role": "developer", "content": "Say."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    settings = {"model": "lora", "max_completion_tokens": 9, "temperature": 0}
    found = client.chat.completions.create(messages=messages, **settings)
    ids = adapters["lora"].processor._tokenize(["<system>Say.\n<user>hi\n<assistant>"], special=True)[0]
    assert found.choices[0].message.content == complete(client, prompt=ids, max_tokens=9).choices[0].text
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **settings))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    with client.chat.completions.stream(messages=messages, **settings) as events:  # which joins the chunks
        for _ in events:
            pass
    assert events.current_completion_snapshot.choices[0].message.content == found.choices[0].message.content


def test_a_base_without_a_template_does_not_chat(client, service):
    tokenizer = service.bank.load_processor(service.bank.read_file("lora")).tokenizer
    tokenizer.chat_template = None
    try:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model="lora", messages=[{"role": "user", "content": "hi"}])
    finally:
        tokenizer.chat_template = CHAT


def test_a_stop_string_ends_the_text_in_front_of_it(client):
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[8:13]
    found = complete(client, max_tokens=40, stop=[stop, "never there"]).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    parts = [chunk.choices[0].text for chunk in complete(client, max_tokens=40, stop=stop, stream=True)]
    assert "".join(parts) == found.text


def test_log_probabilities_are_those_of_the_model(client, adapters):
    found = complete(client, logprobs=2, max_tokens=3)
    scores = found.choices[0].logprobs
    adapter = adapters["lora"]
    ids = adapter.processor.encode_prompt(PROMPT)
    with torch.no_grad():
        logits = adapter.model(input_ids=torch.tensor([ids])).logits[0, -1]
    values, tokens = logits.log_softmax(-1).topk(2)
    assert scores.token_logprobs[0] == pytest.approx(float(values[0]), abs=1e-4)
    names = [adapter.processor.tokenizer.decode([token]) for token in tokens.tolist()]
    assert scores.tokens[0] == names[0] and list(scores.top_logprobs[0]) == names
    assert "".join(scores.tokens) == found.choices[0].text and scores.text_offset[0] == 0
    chat = client.chat.completions.create(
        model="lora", messages=[{"role": "user", "content": "hi"}], max_tokens=2, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 2 and len(content[0].top_logprobs) == 3
    assert content[0].top_logprobs[0].bytes == list(content[0].top_logprobs[0].token.encode())


def test_a_seed_gives_the_same_text_whatever_else_is_asked(client):
    settings = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 10}
    alone = complete(client, seed=7, **settings).choices[0].text
    several = complete(client, prompt=["x", PROMPT, "a longer one, of more words"], seed=7, n=2, **settings)
    assert several.choices[2].text == alone != several.choices[3].text
    assert complete(client, seed=8, **settings).choices[0].text == several.choices[3].text


def test_models_are_the_adapters(client, service):
    models = client.models.list().data
    assert [model.id for model in models] == ["lora", "prompt"]
    assert {(model.parent, model.root, model.owned_by) for model in models[:1]} == {(GPT2, "lora", "inlay")}
    assert client.models.retrieve("lora").adapter_digest == service.bank.read_file("lora").digest


@pytest.mark.parametrize("model", ["nobody", GPT2, "gpt2-tiny"])
def test_an_unknown_adapter_and_the_base_are_not_found(client, model):
    with pytest.raises(openai.NotFoundError, match="unknown adapter"):
        complete(client, model)
    with pytest.raises(openai.NotFoundError):
        complete(client, model, stream=True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model)


def test_an_adapter_of_another_base_is_a_conflict(client):
    with pytest.raises(openai.ConflictError, match="images"):
        complete(client, "images")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"presence_penalty": 1}, "does not support 'presence_penalty'"),
        ({"extra_body": {"min_p": 0.1}}, "does not support 'min_p'"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"top_p": 2}, "top_p must be a number from 0 to 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1 to 200"),
        ({"max_tokens": 201}, "max_tokens must be a whole number from 1 to 200"),
        ({"n": 9}, "at most, and this one asks for 9"),
        ({"n": "2"}, "n must be a whole number"),
        ({"stop": ["a"] * 5}, "stop must be at most 4"),
        ({"stop": 5}, "stop must be at most 4"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"prompt": [1, 99999]}, "99999"),
        ({"prompt": [-1]}, "whole numbers of at least 0"),
        ({"prompt": []}, "whole numbers of at least 0"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": "word " * 101}, "tokens; this server reads 100 at most"),
        ({"prompt": "word" * 100_000}, "characters, which is more than 100 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(client, fields, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence) as refused:
        complete(client, **fields)
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("route", "body", "sentence"),
    [
        ("completions", "no JSON", "the body is no JSON"),
        ("completions", "[" * 100_000, "the body is no JSON"),
        ("completions", "[]", "must be a JSON object"),
        ("completions", '{"prompt": "a"}', "names its adapter as model"),
        ("completions", '{"model": "lora", "prompt": "a", "stream": 1}', "stream must be true or false"),
        ("completions", '{"model": "lora", "prompt": "half \\ud83e"}', "half of a character"),
        ("completions", '{"model": "lora", "prompt": "a", "temperature": NaN}', "temperature must be a number"),
        ("chat/completions", '{"model": "lora", "messages": []}', "messages must be a list"),
        ("chat/completions", '{"model": "lora", "messages": [{"role": "tool", "content": "a"}]}', "the role"),
        ("chat/completions", '{"model": "lora", "messages": [{"role": "user"}]}', "the content"),
        ("chat/completions", '{"model": "lora", "messages": [{"role": "user", "content": [{}]}]}', "the content"),
        ("chat/completions", '{"model": "lora", "messages": [{"role": "user", "tool_calls": [1]}]}', "'tool_calls'"),
        ("chat/completions", '{"model": "lora", "messages": "a", "top_logprobs": 1}', "needs logprobs"),
    ],
)
def test_malformed_bodies_are_refused(client, route, body, sentence):
    refused = httpx.post(f"{client.base_url}{route}", content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400 and sentence in refused.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(client):
    plain = complete(client).choices[0].text
    assert complete(client, temperature=1e-40).choices[0].text == plain
    assert complete(client, presence_penalty=0, logit_bias={}, user="me", best_of=1).choices[0].text == plain


def test_a_client_that_leaves_ends_its_text(client, service, monkeypatch):
    begun, step = [], service.loop.batch.step
    monkeypatch.setattr(service.loop, "watch", begun.extend)
    monkeypatch.setattr(service.loop.batch, "step", lambda: time.sleep(0.02) or step())
    with complete(client, prompt="a", max_tokens=200, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        complete(client, prompt="a", max_tokens=200, timeout=openai.Timeout(5, read=0.1))
    start = time.monotonic()
    while service.active and time.monotonic() < start + 30:
        time.sleep(0.01)
    assert begun and all(request.left and request.written < 200 for request in begun)


def test_other_protocols_get_the_same_text(client):
    prompt = {"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": [PROMPT]}
    most = {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [12]}
    url = client.base_url.copy_with(path="/v2/models/lora/infer")
    answered = httpx.post(str(url), json={"inputs": [prompt, most]}, timeout=60).json()
    assert answered["outputs"][0]["data"] == [complete(client).choices[0].text]


def test_adapters_of_other_tasks_are_models_that_write_nothing(folder):
    client = TestClient(make_app(Service(Bank(VIT, [folder / "images"]), ServiceConfig())))
    assert [(each["id"], each["parent"]) for each in client.get("/v1/models").json()["data"]] == [("images", VIT)]
    refused = client.post("/v1/completions", json={"model": "images", "prompt": "a"})
    assert refused.status_code == 400 and "writes no text" in refused.json()["error"]["message"]
