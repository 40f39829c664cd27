"""The thread that owns a bank of language models: texts of many adapters, written token by token in one batch.

A text joins the batch when there is room and leaves it when it ends, between two tokens, so that a short one does not
wait for a long one. It keeps the weights with which it began: where its adapter is replaced, evicted or removed
meanwhile, the bank holds the old one until the text ends, and requests that come later have the new one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from typing_extensions import override

from inlay.adapters.file import AdapterFile
from inlay.errors import BadInput, ComputationFailed, InlayError
from inlay.serve.bank import Bank, Held, NoRoom
from inlay.serve.decoding import SPARE, DecodingBatch
from inlay.serve.server.batches import explain_failure, explain_misfit
from inlay.serve.server.loop import Loop
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import Replaced, TooLate
from inlay.tasks.serving import Finish, Piece, Prompt, Sampling, TokenScore, Writing, Written

COLD = 1e-5  # a temperature by which logits cannot be divided in float32
PROMPT_TOKENS = 8_192  # read between two tokens of the others, padding included, where there are several prompts


@dataclass(eq=False)
class TextRequest(Request):
    """A prompt, and who reads what follows it.

    Attributes:
        new_tokens: To write at most.
        longest: Tokens of prompt and text in the cache at most.
        write_by: By `time.monotonic`; a text that is not finished then is refused.
        on_piece: Called with each piece, on the thread of the loop.
        written: Tokens so far.
    """

    new_tokens: int = 1
    longest: int = 1
    write_by: float = float("inf")
    on_piece: Callable[[Piece], None] = lambda piece: None
    written: int = 0

    @override
    def count_tokens(self) -> tuple[int, int]:
        return len(self.row.ids), self.written


class GenerationLoop(Loop):
    """Takes prompts from a queue, and writes what follows them.

    Args:
        bank: This thread alone computes with it; others may add and remove adapters meanwhile.
        serving: Of the task of its adapters.
        queue: Where requests wait.
        max_batch: Texts in the batch at most.
        max_wait_s: How long a request waits for others where no text is under way.
        max_new_tokens: Of a text at most.
        max_write_s: How long a text may take.
        cache_mb: Most that keys and values of all texts may take. A text joins only if all can be written to their
            longest within it, so that none has to give way.
        prepare: Called first, on the thread that computes.
        watch: Called with the requests that join, before they are computed.

    Raises:
        InlayError: A base that cannot write several texts in a batch.
    """

    def __init__(
        self,
        bank: Bank,
        serving: Writing,
        queue: RequestQueue,
        *,
        max_batch: int,
        max_wait_s: float,
        max_new_tokens: int,
        max_write_s: float,
        cache_mb: float,
        prepare: Callable[[], None] = lambda: None,
        watch: Callable[[Sequence[Request]], None] = lambda requests: None,
    ) -> None:
        super().__init__("inlay-generation", prepare)
        self.bank = bank
        self.queue = queue
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.max_new_tokens = max_new_tokens
        self.max_write_s = max_write_s
        self.watch = watch
        serving.take_base(bank.model)
        self.batch: DecodingBatch[_Text] = DecodingBatch(bank)
        self.cached_tokens = int(cache_mb * 1e6) // self.batch.token_bytes
        self.positions: int | None = getattr(bank.model.config.get_text_config(), "max_position_embeddings", None)
        self._is_full = False  # the budget has no room for a further adapter until a text ends

    @property
    def writing(self) -> int:
        """Texts under way."""
        return len(self.batch.texts)

    def make_request(self, name: str, file: AdapterFile, row: Prompt, deadline: float) -> TextRequest:
        """A request for the queue.

        Args:
            name: Of the adapter.
            file: Its own, by whose settings the prompt was read.
            row: The prompt.
            deadline: By `time.monotonic`; until then the first token must be there.

        Raises:
            BadInput: A prompt that leaves no room for the tokens it asks for.
        """
        virtual = int(file.config.get("num_virtual_tokens") or 0)
        room = self.cached_tokens - SPARE
        if self.positions is not None:
            room = min(room, self.positions)
        room -= virtual + len(row.ids)
        most = min(room, self.max_new_tokens) if row.max_new_tokens is None else row.max_new_tokens
        if most < 1 or most > room:
            asked = f" and max_tokens {row.max_new_tokens}" if row.max_new_tokens else ""
            also = f", its adapter {virtual}" if virtual else ""
            total = room + virtual + len(row.ids)
            raise BadInput(f"the prompt has {len(row.ids)} tokens{also}{asked}, but {total} fit in all; ask for less.")
        return TextRequest(
            adapter=name,
            digest=file.digest,
            row=row,
            deadline=deadline,
            new_tokens=most,
            longest=virtual + len(row.ids) + most,
            write_by=deadline + self.max_write_s,
        )

    @override
    def run(self) -> None:
        while self._admit() or self.batch.texts:
            if self.batch.texts:
                self._step()

    def _admit(self) -> bool:
        """Let waiting requests join; False if none waits, and none will where the queue is closed."""
        idle = not self.batch.texts
        free = self.max_batch - len(self.batch.texts)
        if not free:
            return True
        wait_s = self.max_wait_s if idle else 0.0
        requests = self.queue.take(free, wait_s=wait_s, fits=self._has_room, block=idle)
        if requests:
            self.watch(requests)
            texts: list[_Text] = []
            for request in requests:
                text = self._begin(request, alone=idle and not texts)
                if text is not None:
                    texts.append(text)
            self._join(texts)
        return bool(requests)

    def _has_room(self, taken: Sequence[Request], request: Request) -> bool:
        """Whether the cache and the budget for adapters have room for one more text, and this step for its prompt."""
        prompts = [len(each.row.ids) for each in [*taken, request]]
        if taken and len(prompts) * max(prompts) > PROMPT_TOKENS:
            return False
        others = [*(text.request for text in self.batch.texts), *taken]
        longest = max(each.longest for each in [*others, request] if isinstance(each, TextRequest))
        rows = max(len(others) + 1, self.batch.shape[0])
        if rows * (longest + SPARE) > self.cached_tokens:
            return False
        adapters = {(each.adapter, each.digest) for each in others}
        if (request.adapter, request.digest) in adapters or not others:
            return True
        room = self.bank.room
        return not self._is_full and (room is None or len(adapters) < room)

    def _begin(self, request: Request, *, alone: bool) -> "_Text | None":
        """The text of a request, whose adapter is held from here on; None where it cannot begin now."""
        assert isinstance(request, TextRequest)
        if request.left:
            return None
        try:
            held = self.bank.hold(request.adapter)
        except Exception as error:
            if isinstance(error, NoRoom) and not alone:  # there is more room once another text ends
                self._is_full = True
                self.queue.put_back(request)
            else:
                request.future.set_exception(explain_misfit(error, self.bank, [request.adapter]))
            return None
        if held.digest != request.digest:
            self.bank.release(held)
            request.future.set_exception(Replaced(f"adapter {request.adapter!r} was replaced; ask again."))
            return None
        return _Text(request, held, self.bank.model.device)

    def _join(self, texts: Sequence["_Text"]) -> None:
        """Read prompts into the batch; those that fail together are read one by one."""
        if not texts:
            return
        try:
            logits = self.batch.join(texts)
        except Exception as error:
            if len(texts) == 1:
                texts[0].fail(explain_failure(error))
                self.bank.release(texts[0].held)
                return
            for text in texts:
                self._join([text])
            return
        self._go_on(texts, logits)

    def _step(self) -> None:
        """Write the next token of each text."""
        try:
            logits = self.batch.step()
        except Exception as error:  # the cache has the token in some blocks and not in others
            failure = explain_failure(error)
            for text in self.batch.texts:
                text.fail(failure)
            self._leave_ended()
            return
        self._go_on(self.batch.texts, logits)

    def _go_on(self, texts: Sequence["_Text"], logits: Tensor) -> None:
        logits = logits.float()
        damaged = logits.isnan().any(-1).tolist()
        best = logits.argmax(-1).tolist()
        now = time.monotonic()
        for i, text in enumerate(texts):
            if text.request.left:
                text.ended = True
            elif now > text.request.write_by:
                text.fail(TooLate(f"the text was not written within {self.max_write_s:g} s."))
            elif damaged[i]:
                text.fail(ComputationFailed(f"adapter {text.held.name!r} computes no numbers (NaN) for this prompt."))
            else:
                try:
                    text.go_on(best[i], logits[i])
                except Exception as error:
                    text.fail(explain_failure(error))
        self._leave_ended()

    def _leave_ended(self) -> None:
        ended = [text for text in self.batch.texts if text.ended]
        if ended:
            self.batch.leave(ended)
            self._is_full = False
        for text in ended:
            self.bank.release(text.held)


class _Text:
    """One text under way."""

    def __init__(self, request: TextRequest, held: Held, device: torch.device) -> None:
        self.request = request
        self.prompt: Prompt = request.row
        self.held = held
        self.ids = self.prompt.ids
        self.ended = False
        self.last = 0  # the token that the model reads next
        self._writer = self.prompt.make_writer()
        self._shape = _make_processors(self.prompt.sampling)
        self._generator = torch.Generator(device)
        if self.prompt.sampling.seed is not None:
            self._generator.manual_seed(self.prompt.sampling.seed)
        else:
            self._generator.seed()
        self._count = 0
        self._text: list[str] = []
        self._scores: list[TokenScore] = []

    def go_on(self, best: int, logits: Tensor) -> None:
        """Take the next token, the most probable one or a drawn one, and hand out what it adds."""
        self.last = best if self._shape is None else self._draw(logits)
        self._count += 1
        self.request.written = self._count
        score = self._score(logits)
        finish: Finish | None = None
        if self.last in self.prompt.ends:
            text, finish = self._writer.finish(), "stop"
        else:
            text = self._writer.add(self.last)
            if self._count == self.request.new_tokens:
                text += self._writer.finish()
                finish = "length"
            if self._writer.stopped:
                finish = "stop"
        self._hand_out(Piece(text, finish, score))

    def fail(self, error: InlayError) -> None:
        """End without a text."""
        self.ended = True
        self.request.future.set_exception(error)

    def _hand_out(self, piece: Piece) -> None:
        self._text.append(piece.text)
        if piece.score is not None:
            self._scores.append(piece.score)
        try:
            self.request.on_piece(piece)
        except RuntimeError:  # the event loop of its reader has ended
            self.request.left = self.ended = True
            return
        if piece.finish is not None:
            self.ended = True
            self.request.answered = time.monotonic()
            self.request.future.set_result(Written("".join(self._text), self._count, piece.finish, self._scores))

    def _draw(self, logits: Tensor) -> int:
        assert self._shape is not None
        scores = self._shape(None, logits[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def _score(self, logits: Tensor) -> TokenScore | None:
        count = self.prompt.logprobs
        if count is None:
            return None
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        top = [(self._writer.name(t), v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
        return TokenScore(self._writer.name(self.last), float(logprobs[self.last]), top)


def _make_processors(sampling: Sampling) -> Any:
    """What shapes the logits before a token is drawn, as in transformers' `generate`; None: none is drawn."""
    if sampling.temperature < COLD:
        return None
    steps: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(steps)
