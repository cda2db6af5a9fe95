"""What one worker answers for one sample: gathered from the engine's updates, ended where its text ends.

A sample that streams or has stop strings is followed token by token; any other one is looked at once it has ended. It knows no
HTTP. Neighbours: `detokenizer` (text), `engine_client` (updates), `app` (writes what comes out).
"""

from typing import NamedTuple

from msgspec.structs import replace

from common.errors import RequestFailed
from common.messages import (
    FinishReason,
    Generate,
    RequestOptions,
    RowBlock,
    RowHeader,
    SamplingParams,
    Tokens,
    TopLogprobs,
)
from common.protocol.logprobs import logprob_fields
from common.protocol.replies import Reply, progress_reply
from common.server.detokenizer import OutputText, Stop
from common.server.engine_client import Ended
from common.server.tokenizer import Tokenizer
from common.versions import cut


class Answer(NamedTuple):
    """A sample's end as this worker answers it; `logprobs` are the reply's fields."""

    ended: Ended
    text: str
    logprobs: Reply
    prompt_ids: list[int] | None = None
    """What a retracted sample that has tokens goes on from, before them."""


class SampleOutput:
    """One sample of a request, from its first token to its end.

    Its text begins with that of the tokens that are resumed; all else is about the new ones. Making one may take long, and
    raises RequestError if the sample would have stopped before.
    """

    def __init__(self, message: Generate, tokenizer: Tokenizer) -> None:
        self._message = message
        self._options = options = message.options
        self._tokenizer = tokenizer
        self._resumed_ids = message.input_ids[len(message.input_ids) - options.resumed_tokens :]
        self._is_followed = options.stream or bool(options.sampling.stop)
        self._text = OutputText(tokenizer, options.sampling, self._resumed_ids if self._is_followed else ())
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []
        self._stop: Stop | None = None

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string was found: what still comes is cut off."""
        return self._stop is not None

    def take(self, tokens: Tokens) -> Stop | None:
        """Take tokens that were just settled; returns a stop that the engine must be told of. Not once it has stopped."""
        assert self._stop is None
        kept = self._read(tokens.token_ids)
        self._logprobs += tokens.logprobs[:kept]
        self._top_logprobs += tokens.top_logprobs[:kept]
        return self._stop

    def progress(self) -> Reply:
        """Make the stream's event for what there is so far."""
        return progress_reply(
            self._message.rid,
            text=self._text.visible(),
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            top_logprobs=self._top_logprobs,
            prompt_tokens=len(self._message.input_ids),
            options=self._options,
            text_of=self._tokenizer.text_of,
        )

    def end(self, ended: Ended) -> Answer:
        """Make the answer of a sample that has ended; it may take long. Raises RequestFailed if tokens got lost.

        A stop string that the engine has not heard of in time ends the sample all the same.
        """
        options, reason = self._options, ended.finished.finish_reason
        at_stop_token = reason.type == "stop" and isinstance(reason.matched, int)
        if self._is_followed:
            if self._stop is None:
                self._read(ended.finished.token_ids[len(self._token_ids) :])
                # A character that a retracted sample has begun may still become another one.
                self._stop = self._stop if reason.is_retracted else self._stop or self._text.finish()
            text = self._text.final(at_stop_token=at_stop_token)
        else:
            token_ids = self._resumed_ids + ended.finished.token_ids
            text = self._whole_text(token_ids, options.sampling, at_stop_token=at_stop_token)
        if self._stop is not None:
            ended = cut_at_stop(ended, self._stop)
        finished = ended.finished
        goes_on = finished.finish_reason.is_retracted and finished.token_ids
        prompt_ids = self._message.input_ids if goes_on else None
        return Answer(ended, text, logprobs_of(ended, options, self._tokenizer), prompt_ids)

    def _read(self, token_ids: list[int]) -> int:
        """Append tokens up to the one that completes a stop string; returns how many that are."""
        for count, token_id in enumerate(token_ids, start=1):
            self._token_ids.append(token_id)
            self._stop = self._text.push(token_id)
            if self._stop is not None:
                return count
        return len(token_ids)

    def _whole_text(self, token_ids: list[int], params: SamplingParams, *, at_stop_token: bool) -> str:
        if at_stop_token and not params.no_stop_trim:
            token_ids = token_ids[:-1]
        return self._tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)


def logprobs_of(ended: Ended, options: RequestOptions, tokenizer: Tokenizer) -> Reply:
    """Make a reply's logprob fields; none if they were not asked for."""
    return logprob_fields(ended.finished, options, tokenizer.text_of) if options.return_logprob else {}


def cut_at_stop(ended: Ended, stop: Stop) -> Ended:
    """Make a sample end at a stop string: tokens, logprobs and rows beyond it fall away, and it is the reason.

    Raises RequestFailed if the sample has fewer tokens than it has reported.
    """
    finished, rows = ended
    count = stop.num_tokens
    if len(finished.token_ids) < count:
        raise RequestFailed(
            f"the engine has ended {finished.rid!r} with {len(finished.token_ids)} tokens after it had reported {count}",
            stage="engine",
        )
    stop_position = finished.prompt_tokens + count - 1
    rows = None if rows is None else _cut_rows(rows, stop_position)
    finished = replace(
        finished,
        token_ids=finished.token_ids[:count],
        logprobs=finished.logprobs[:count],
        top_logprobs=finished.top_logprobs[:count],
        finish_reason=FinishReason(type="stop", matched=stop.matched),
        rows=None if rows is None else rows.header,
        weight_versions=cut(finished.weight_versions, 0, stop_position),
    )
    return Ended(finished, rows)


def _cut_rows(block: RowBlock, stop: int) -> RowBlock:
    """Take the rows of positions below `stop` alone."""
    header = block.header
    if header.stop <= stop:
        return block
    stop = max(header.start, stop)
    spans = cut(header.weight_versions, header.start, stop)
    shorter: RowHeader = replace(header, stop=stop, weight_versions=spans)
    return RowBlock(shorter, memoryview(block.data)[: shorter.num_bytes])
