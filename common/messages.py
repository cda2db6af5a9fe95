"""What a request is, how it is answered, and what a worker's frontend and engine say to each other: frozen structs.

    HTTP frontend  --FrontendToEngine-->  engine       over ZMQ, bulk bytes as an extra frame
    HTTP frontend  <--EngineToFrontend--  engine

Receivers `match` on the tagged struct and end in `assert_never`. The module knows no socket and no encoding of rows; its
neighbours are `common.wire` (sends these), `common.protocol` (translates HTTP bodies to and from these), `common.orders` (a
trainer's orders, the rest of the unions) and `transfer.messages` (the same between decode and prefill engines).

Ranges are half-open and absolute everywhere: P prompt tokens, G generated tokens, s = `routed_experts_start_len`.
"""

from typing import Literal, NamedTuple

from msgspec import Struct

from common.errors import RequestError, RequestFailed, TandemError
from common.orders import Done, Order

Leg = Literal["prefill", "decode"]
WorkerKind = Literal["prefill", "decode", "aggregated"]
"""A worker serves one leg of each request, or the whole of it."""
RowDtype = Literal["uint8", "uint16"]


def leg_of(kind: WorkerKind) -> Leg | None:
    """Which leg a worker of this kind serves; None if it has no other one beside it."""
    return None if kind == "aggregated" else kind


# ------------------------------------------------------------------------------------------------ requests


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How tokens are drawn; validated by `common.protocol.generate`, trusted everywhere below it."""

    n: int = 1
    """Samples of the prompt; sample i draws with seed + i."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens cannot be drawn before."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    """Strings that end the text; the frontend finds them, and they and what follows are cut off the text."""
    no_stop_trim: bool = False
    """Keep the stop string or stop token in the text."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    seed: int = 0


class RequestOptions(Struct, frozen=True, kw_only=True):
    """All that a request asks for besides its prompt; it travels whole, no option is passed on alone."""

    sampling: SamplingParams = SamplingParams()
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    """First prompt position whose logprob is wanted; -1: none of the prompt."""
    top_logprobs_num: int = 0
    """How many of the likeliest tokens to report at each position besides the drawn one."""
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    routed_experts_dtype: Literal["int32", "auto"] = "int32"
    data_parallel_rank: int | None = None
    """The attention group of the worker that is to have the request; None: the worker chooses."""
    allow_mixed_versions: bool = False
    """Whether its positions may be computed by weights of several versions."""
    resumed_tokens: int = 0
    """So many tokens at the prompt's end are output of earlier legs of this sample; text, stop strings and penalties count them."""
    resumed_versions: tuple[str, ...] = ()
    """The weights that those legs had; a request that may not mix versions goes on under no others."""


class Bootstrap(Struct, frozen=True):
    """Where the decode leg finds the prefill leg: the prefill worker's ZMQ address, and a room for each of the n samples."""

    host: str
    port: int
    rooms: tuple[int, ...]

    @property
    def room(self) -> int:
        """The first sample's room, with which all of the prompt's pages travel."""
        return self.rooms[0]


# ------------------------------------------------------------------------------------------------ rows


class VersionSpan(Struct, frozen=True, array_like=True):
    """Rows `[start, stop)` were computed by weights of this version."""

    start: int
    stop: int
    weight_version: str


class RowHeader(Struct, frozen=True, kw_only=True):
    """What a block of rows is: positions `[start, stop)`, `[stop - start, len(layer_ids), top_k]` ids of `dtype`.

    `layer_ids` are the global numbers of the MoE layers, in order; `num_hidden_layers` counts the dense ones too.
    """

    start: int
    stop: int
    dtype: RowDtype
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    num_hidden_layers: int
    weight_versions: tuple[VersionSpan, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[rows, MoE layers, K]`."""
        return (self.stop - self.start, len(self.layer_ids), self.top_k)

    @property
    def num_bytes(self) -> int:
        """Length of the data that belongs to this header."""
        rows, layers, top_k = self.shape
        return rows * layers * top_k * (1 if self.dtype == "uint8" else 2)


class RowBlock(NamedTuple):
    """A header and its rows as raw little-endian C-order bytes; between processes the bytes are a frame of their own."""

    header: RowHeader
    data: bytes | memoryview


# ------------------------------------------------------------------------------------------------ errors


class ErrorReport(Struct, frozen=True, kw_only=True):
    """An error on its way to the client: the body's fields and the HTTP status."""

    status: int
    message: str
    code: str
    leg: str | None = None
    stage: str | None = None
    rid: str | None = None

    @classmethod
    def of(
        cls, error: Exception, *, leg: str | None = None, stage: str | None = None, rid: str | None = None
    ) -> "ErrorReport":
        """Describe `error`; what the error itself says of leg and stage wins."""
        if isinstance(error, ReportedError):
            return error.report
        if isinstance(error, RequestFailed):
            leg, stage = error.leg or leg, error.stage or stage
        if isinstance(error, RequestFailed | RequestError):
            return cls(status=error.status, message=str(error), code=error.code, leg=leg, stage=stage, rid=rid)
        status = 502 if isinstance(error, TandemError) else 500
        message = str(error) if isinstance(error, TandemError) else f"internal error: {type(error).__name__}: {error}"
        return cls(status=status, message=message, code="internal", leg=leg, stage=stage, rid=rid)


class ReportedError(TandemError):
    """A failure that came from another process, or is ready for the client: the report says all of it."""

    def __init__(self, report: ErrorReport) -> None:
        super().__init__(report.message)
        self.report = report


# ------------------------------------------------------------------------------------------------ frontend -> engine


class Generate(Struct, frozen=True, tag=True, kw_only=True):
    """Run one sample. `bootstrap` is there on both legs of a pair; a scored prompt and a worker's health check have none."""

    rid: str
    input_ids: list[int]
    options: RequestOptions
    bootstrap: Bootstrap | None = None


class Abort(Struct, frozen=True, tag=True):
    """The client is gone: stop the request, answer nothing, give everything back."""

    rid: str


EndCause = Literal["requested", "retracted"]
"""Why a sample ends early with an answer: somebody wants no more of it, or it is to go on later, from its tokens alone."""


class FinishNow(Struct, frozen=True, tag=True):
    """Somebody asked for the request's end: answer each of its samples with what it has, and the reason `abort`."""

    rid: str
    cause: EndCause = "requested"


class StopAt(Struct, frozen=True, tag=True, kw_only=True):
    """The frontend has found a stop string: the sample's answer is its first `num_tokens` tokens."""

    rid: str
    index: int
    num_tokens: int
    matched: str


class GetStats(Struct, frozen=True, tag=True):
    """Ask for one `Stats` with the same serial."""

    serial: int


class FlushCache(Struct, frozen=True, tag=True):
    """Forget all cached prefixes; answered by `CacheFlushed` with the same serial once no transfer is in flight."""

    serial: int


class Shutdown(Struct, frozen=True, tag=True):
    """Leave the loop and exit with code 0."""


FrontendToEngine = Generate | Abort | FinishNow | StopAt | GetStats | FlushCache | Shutdown | Order


# ------------------------------------------------------------------------------------------------ engine -> frontend


class EngineReady(Struct, frozen=True, tag=True, kw_only=True):
    """The engine has its weights and its memory; the limits are those that a request is checked against."""

    model_type: str
    dtype: str
    device: str
    vocab_size: int
    context_tokens: int
    kv_pool_tokens: int
    page_size: int
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    max_running_requests: int
    weight_version: str


TopLogprobs = list[tuple[float, int]]
"""The likeliest tokens at one position, likeliest first: `(logprob, token id)`."""


class PromptLogprobs(Struct, frozen=True):
    """Logprobs of the prompt's own tokens at positions `[logprob_start_len, P)`; None for position 0, which nothing predicts."""

    logprobs: list[float | None]
    token_ids: list[int]
    top_logprobs: list[TopLogprobs | None]
    """Empty if none were asked for."""


class Tokens(Struct, frozen=True, tag=True):
    """Tokens of sample `index` that were just settled, for a request that streams or has stop strings."""

    rid: str
    token_ids: list[int]
    logprobs: list[float]
    index: int = 0
    top_logprobs: list[TopLogprobs] = []


class FinishReason(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a sample ended.

    `stop` with the token id or the string that matched, `length` with the number of tokens, or `abort` with a message and a
    cause: an `EndCause` is an answer, anything else a failure.
    """

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    cause: str | None = None

    @classmethod
    def early(cls, cause: EndCause, where: str) -> "FinishReason":
        """Say that somebody has ended it; `where` says how far it was."""
        how = "aborted by request" if cause == "requested" else "retracted"
        return cls(type="abort", message=f"{how} {where}", cause=cause)

    @property
    def is_requested(self) -> bool:
        """Whether somebody wanted no more of it."""
        return self.type == "abort" and self.cause == "requested"

    @property
    def is_retracted(self) -> bool:
        """Whether it is to go on later."""
        return self.type == "abort" and self.cause == "retracted"


class Finished(Struct, frozen=True, tag=True, kw_only=True):
    """A sample's end. The message's extra frame holds the rows of `rows`, if there are any.

    `token_ids` are all output tokens that this leg knows: the first one of each of the n samples on a prefill leg, which ends
    once; all G of sample `index` on a decode leg, which ends n times. Rows are absent if none were asked for, and when an abort
    came before the prompt's rows existed.
    """

    rid: str
    index: int = 0
    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    top_logprobs: list[TopLogprobs] = []
    prompt_logprobs: PromptLogprobs | None = None
    rows: RowHeader | None = None
    weight_versions: tuple[VersionSpan, ...] = ()
    """Of the forward passes of this leg's positions: `[0, P)` on a prefill leg, `[P, P+G-1)` on a decode leg, else both.

    The token at position i + 1 was drawn by the forward pass of position i.
    """
    timings: dict[str, float] = {}


class Failed(Struct, frozen=True, tag=True):
    """A sample's end without an answer; whatever it held has been or will be given back."""

    rid: str
    error: ErrorReport


class PageCounts(Struct, frozen=True, kw_only=True):
    """Where every KV page of a worker is, recounted from the owners; `unaccounted` other than 0 is a leak or a double free."""

    total: int
    free: int
    cached: int
    running: int
    quarantined: int
    unaccounted: int


class Stats(Struct, frozen=True, tag=True, kw_only=True):
    """An engine's gauges and counters since it started."""

    serial: int
    queued_requests: int
    running_requests: int
    pages: PageCounts
    steps: int
    tokens_computed: int
    tokens_cached: int
    rows_committed: int
    rows_dropped: int
    rows_refused: int
    kv_bytes: int
    kv_writes: int
    rooms: int
    dropped_messages: int
    swaps: int = 0
    failed_steps: int = 0


class Beat(Struct, frozen=True, tag=True):
    """The engine's loop turns; sent about once a second, whether there is anything to compute or not."""

    num_steps: int
    quarantined_pages: int
    num_pages: int


class CacheFlushed(Struct, frozen=True, tag=True):
    """The prefix cache is empty, or `refusal` says why it is not."""

    serial: int
    refusal: str | None = None


EngineToFrontend = EngineReady | Tokens | Finished | Failed | Stats | CacheFlushed | Beat | Done
