"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`, as OpenAI's clients ask: the model is an adapter's name.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="restaurants", prompt="name[Aromi]", max_tokens=40, temperature=0)

Fields that would change the text and are not known here are refused; those of IGNORED change nothing.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from inlay.errors import BadInput, InlayError
from inlay.serve.server.answers import make_error_body, name_signature, parse_object, run_unless_gone
from inlay.serve.server.service import Service
from inlay.serve.server.streams import TextStream
from inlay.tasks.serving import Piece, TokenScore

router = APIRouter()

IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
NEUTRAL: Mapping[str, Sequence[Any]] = {  # values that ask for nothing, of fields that are refused otherwise
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop")
COMMON = {"model", "max_tokens", "n", "stream", "stream_options", "logprobs", *SAMPLING}
COMPLETION_TOKENS = 16  # where a completion does not say how many
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Asked:
    """What a request asks for, whatever its form.

    Attributes:
        model: An adapter's name.
        values: Of each text, as the task reads them: those of one prompt follow each other.
        count: Texts of each prompt.
        stream: Send pieces as they come.
        usage: Tell the tokens behind them.
        echo: Begin each text with its prompt.
    """

    model: str
    values: list[dict[str, Any]]
    count: int
    stream: bool
    usage: bool
    echo: bool = False


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All adapters."""
    service: Service = request.app.state.service
    return {"object": "list", "data": [_describe_model(service, name) for name in service.bank.names]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """One adapter, with the digests of its file and of its base."""
    service: Service = request.app.state.service
    signature = service.sign(name, service.find_file(name))
    facts = name_signature(signature)
    del facts["model"]
    return {**_describe_model(service, name), **facts}


@router.post("/v1/completions")
async def complete(request: Request) -> Response:
    """Continue prompts: a text, a list of texts, tokens, or a list of lists of tokens."""
    given = await _read_body(request, COMMON | {"prompt", "echo"})
    prompts = _list_prompts(given.get("prompt"))
    settings = {"max_tokens": COMPLETION_TOKENS, "temperature": 1.0, **_take(given, "max_tokens", *SAMPLING)}
    settings |= _take(given, "logprobs")
    asked = _ask(given, [{**prompt, **settings} for prompt in prompts], echo=_read_flag(given, "echo"))
    if asked.echo and "logprobs" in settings:
        raise BadInput("echo with logprobs is not supported: the prompt's tokens get no probabilities.")
    return await _answer(request, asked, _Completion())


@router.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    """Answer a conversation, which the base's chat template writes as a prompt."""
    given = await _read_body(request, COMMON | {"messages", "max_completion_tokens", "top_logprobs"})
    settings = {"max_tokens": None, "temperature": 1.0, **_take(given, "max_tokens", *SAMPLING)}
    if "max_completion_tokens" in given:
        settings["max_tokens"] = given["max_completion_tokens"]
    if _read_flag(given, "logprobs"):
        settings["logprobs"] = given.get("top_logprobs", 0)
    elif "top_logprobs" in given:
        raise BadInput("top_logprobs needs logprobs: true.")
    asked = _ask(given, [{"messages": _read_messages(given.get("messages")), **settings}])
    return await _answer(request, asked, _Chat())


async def _read_body(request: Request, known: set[str]) -> dict[str, Any]:
    """The fields of a request that are not null, each of which is known."""
    body = parse_object(await request.body(), "the body is no JSON.")
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key not in known | IGNORED and value not in NEUTRAL.get(key, ()):
            raise BadInput(f"this server does not support {key!r}; leave it out.")
    return given


def _take(given: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: given[key] for key in keys if key in given}


def _ask(given: Mapping[str, Any], values: list[dict[str, Any]], *, echo: bool = False) -> Asked:
    """A request for `n` texts of each prompt, whose seeds follow each other."""
    model, count, options = given.get("model"), given.get("n", 1), given.get("stream_options", {})
    if not isinstance(model, str):
        raise BadInput("a request names its adapter as model, which is missing.")
    if type(count) is not int or count < 1:
        raise BadInput(f"n must be a whole number of at least 1, got {count!r}.")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise BadInput("stream_options may have include_usage only.")
    texts = []
    for each in values:
        seed = each.get("seed")
        seeds = [{"seed": seed + i} if type(seed) is int else {} for i in range(count)]
        texts += [{**each, **own} for own in seeds]
    return Asked(model, texts, count, _read_flag(given, "stream"), _read_flag(options, "include_usage"), echo)


def _read_flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise BadInput(f"{key} must be true or false, got {value!r}.")
    return value


def _list_prompts(prompt: Any) -> list[dict[str, Any]]:
    """Each prompt under the name by which the task reads it."""
    several = isinstance(prompt, list) and prompt and all(isinstance(each, str | list) for each in prompt)
    prompts = prompt if several else [prompt]
    if not all(isinstance(each, str | list) for each in prompts):
        raise BadInput("prompt must be a text, a list of texts, a list of tokens, or a list of those.")
    return [{"prompt": each} if isinstance(each, str) else {"input_ids": each} for each in prompts]


def _read_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise BadInput("messages must be a list of objects with a role and a content, and at least one.")
    return [_read_message(message) for message in messages]


def _read_message(message: Mapping[str, Any]) -> dict[str, str]:
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if unknown:
        raise BadInput(f"this server does not support {unknown[0]!r} in a message; leave it out.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadInput(f"the role of a message must be one of {', '.join(ROLES)}, got {role!r}.")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadInput("the content of a message must be a text, or a list of parts of type text.")
    return {"role": ROLES[role], "content": "".join(texts)}


async def _answer(request: Request, asked: Asked, form: "_Form") -> Response:
    service: Service = request.app.state.service
    most = service.config.max_batch
    if len(asked.values) > most:
        raise BadInput(f"a request may ask for {most} texts at most, and this one asks for {len(asked.values)}.")
    streams = await run_unless_gone(request, _begin(service, asked))
    signed = name_signature(service.sign(asked.model, streams[0].file))
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.chunk if asked.stream else form.whole,
        "created": int(time.time()),
        **signed,
        "system_fingerprint": f"{signed['adapter_digest']}-{signed['base_digest']}",
    }
    if asked.stream:
        return StreamingResponse(_send(head, streams, asked, form), media_type="text/event-stream")
    texts = await run_unless_gone(request, _read_all(streams, asked))
    choices = [form.make_choice(i, text) for i, text in enumerate(texts)]
    return JSONResponse({**head, "choices": choices, "usage": _count(streams, texts, asked)})


async def _begin(service: Service, asked: Asked) -> list[TextStream]:
    """All texts, once each has begun; none goes on where one of them cannot."""
    tasks = [asyncio.ensure_future(service.write(asked.model, values)) for values in asked.values]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for begun in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(begun, TextStream):
                begun.close()
        raise


@dataclass
class _Text:
    """What has been written of one text."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    scores: list[TokenScore] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        if piece.score is not None:
            self.scores.append(piece.score)
            self.offsets.append(len(self.text))
        self.text += piece.text
        self.tokens += 1
        self.finish = piece.finish


async def _read_all(streams: Sequence[TextStream], asked: Asked) -> list[_Text]:
    texts = [_Text(stream.request.row.text if asked.echo else "") for stream in streams]
    try:
        for stream, text in zip(streams, texts, strict=True):
            async for piece in stream.read():
                text.add(piece)
    finally:
        for stream in streams:
            stream.close()
    return texts


async def _send(
    head: Mapping[str, Any], streams: Sequence[TextStream], asked: Asked, form: "_Form"
) -> AsyncIterator[str]:
    """Events of the texts as they are written, side by side."""
    texts = [_Text(stream.request.row.text if asked.echo else "") for stream in streams]
    pieces: asyncio.Queue[tuple[int, Piece | InlayError]] = asyncio.Queue()

    async def read(i: int, stream: TextStream) -> None:
        try:
            async for piece in stream.read():
                pieces.put_nowait((i, piece))
        except InlayError as error:
            pieces.put_nowait((i, error))

    readers = [asyncio.ensure_future(read(i, stream)) for i, stream in enumerate(streams)]
    try:
        for i, text in enumerate(texts):
            if opening := form.make_opening(i, text):
                yield _event({**head, "choices": [opening]})
        while any(text.finish is None for text in texts):
            i, piece = await pieces.get()
            if isinstance(piece, InlayError):
                yield _event({"error": make_error_body(500, str(piece))})
                break
            text = texts[i]
            text.add(piece)
            if piece.text or piece.score or piece.finish:
                yield _event({**head, "choices": [form.make_part(i, text, piece)]})
        else:
            if asked.usage:
                yield _event({**head, "choices": [], "usage": _count(streams, texts, asked)})
        yield "data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()
        for stream in streams:
            stream.close()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _count(streams: Sequence[TextStream], texts: Sequence[_Text], asked: Asked) -> dict[str, int]:
    """Tokens of each prompt, once, and of all texts."""
    prompts = sum(len(stream.request.row.ids) for stream in streams[:: asked.count])
    written = sum(text.tokens for text in texts)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


class _Form:
    """What texts look like in the answers of one route."""

    prefix: str
    whole: str
    chunk: str

    def make_choice(self, index: int, text: _Text) -> dict[str, Any]:
        """A whole text."""
        raise NotImplementedError

    def make_opening(self, index: int, text: _Text) -> dict[str, Any] | None:
        """What is sent before the first piece."""
        raise NotImplementedError

    def make_part(self, index: int, text: _Text, piece: Piece) -> dict[str, Any]:
        """One piece, which `text` has as its last."""
        raise NotImplementedError


class _Completion(_Form):
    prefix = "cmpl"
    whole = chunk = "text_completion"

    def make_choice(self, index: int, text: _Text) -> dict[str, Any]:
        logprobs = self._make_logprobs(text.scores, text.offsets)
        return {"index": index, "text": text.text, "logprobs": logprobs, "finish_reason": text.finish}

    def make_opening(self, index: int, text: _Text) -> dict[str, Any] | None:
        if not text.text:
            return None
        return {"index": index, "text": text.text, "logprobs": None, "finish_reason": None}

    def make_part(self, index: int, text: _Text, piece: Piece) -> dict[str, Any]:
        logprobs = self._make_logprobs([piece.score] if piece.score else [], text.offsets[-1:])
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _make_logprobs(self, scores: Sequence[TokenScore], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not scores:
            return None
        return {
            "tokens": [score.token for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{**dict(score.top), score.token: score.logprob} for score in scores],
            "text_offset": list(offsets),
        }


class _Chat(_Form):
    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def make_choice(self, index: int, text: _Text) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        logprobs = self._make_logprobs(text.scores)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": text.finish}

    def make_opening(self, index: int, text: _Text) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def make_part(self, index: int, text: _Text, piece: Piece) -> dict[str, Any]:
        logprobs = self._make_logprobs([piece.score] if piece.score else [])
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def _make_logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        return {"content": [self._score(score) for score in scores]}

    def _score(self, score: TokenScore) -> dict[str, Any]:
        top = [self._name(*each) for each in score.top]
        return {**self._name(score.token, score.logprob), "top_logprobs": top}

    def _name(self, token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _describe_model(service: Service, name: str) -> dict[str, Any]:
    path = service.bank.find_path(name)
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "inlay",
        "root": Path(path).name if Path(path).exists() else str(path),
        "parent": service.base_name,
    }
