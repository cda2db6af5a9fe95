"""reply_format: a reply with the rows of a 32k-token request, made as a server makes it and read as a client reads it.

msgpack carries the rows as bytes of the smallest dtype, the default JSON as base64 of int32. Making is the servers' own
writer, part by part; reading ends with an array of ids. Both readers are msgspec's: the standard library's are slower.
"""

from collections.abc import Callable

import msgspec

from common.messages import Finished, FinishReason, RequestOptions, RowBlock
from common.protocol.replies import encode_json, encode_msgpack, sample_reply
from common.routed_experts.codec import rows_from_reply
from common.server.bodies import BodyWriter
from deploy.bench.figures import Figure, make_figure
from deploy.bench.material import LONG_TOKENS, WEIGHT_VERSION, make_block
from deploy.bench.options import BenchOptions
from deploy.bench.rounds import alternate, seconds_of

_NAME = "reply_format"
_OUTPUT_TOKENS = 32


def run(options: BenchOptions) -> list[Figure]:
    """Measure making and reading, in milliseconds, and count the bytes."""
    block = make_block(0, options.scaled(LONG_TOKENS))
    bodies = {binary: make_body(block, binary=binary) for binary in (True, False)}
    tasks: dict[tuple[str, bool], Callable[[], object]] = {
        **{("making", binary): lambda binary=binary: make_parts(block, binary=binary) for binary in bodies},  # type: ignore[misc]
        **{("reading", binary): lambda binary=binary: read_body(bodies[binary], binary=binary) for binary in bodies},  # type: ignore[misc]
    }
    values = alternate(
        {key: lambda task=task: 1e3 * seconds_of(task) for key, task in tasks.items()},  # type: ignore[misc]
        options.rounds,
    )
    both = {binary: _sums(values["making", binary], values["reading", binary]) for binary in bodies}
    sizes = {binary: [len(body) / 1e6] for binary, body in bodies.items()}

    def figure(what: str, unit: str, by_form: dict[bool, list[float]]) -> Figure:
        case = f"{what} {block.header.shape[0]:,} rows"
        return make_figure(_NAME, case, unit, ("msgpack", by_form[True]), ("int32 JSON", by_form[False]))

    return [
        figure("making", "ms", {binary: values["making", binary] for binary in bodies}),
        figure("reading", "ms", {binary: values["reading", binary] for binary in bodies}),
        figure("making and reading", "ms", both),
        figure("size of", "MB", sizes),
    ]


def make_parts(block: RowBlock, *, binary: bool) -> list[bytes | memoryview]:
    """Make a reply as a server does, to its last part; nobody sends them."""
    writer = BodyWriter(binary=binary)
    finished = Finished(
        rid="bench",
        prompt_tokens=block.header.stop,
        cached_tokens=0,
        token_ids=list(range(_OUTPUT_TOKENS)),
        logprobs=[],
        finish_reason=FinishReason(type="length", length=_OUTPUT_TOKENS),
    )
    reply = sample_reply(
        finished,
        text="some words" * _OUTPUT_TOKENS,
        options=RequestOptions(return_routed_experts=True),
        weight_version=WEIGHT_VERSION,
        e2e_latency_s=0.0,
        rows=writer.rows(block, "int32"),
    )
    return list(writer.body((encode_msgpack if binary else encode_json)(reply)).parts())


def make_body(block: RowBlock, *, binary: bool) -> bytes:
    """Make a reply in one piece."""
    return b"".join(make_parts(block, binary=binary))


def read_body(body: bytes, *, binary: bool) -> object:
    """Read a reply as a client does: an array `[rows, layers, K]`."""
    reply = msgspec.msgpack.decode(body) if binary else msgspec.json.decode(body)
    return rows_from_reply(reply["meta_info"])


def _sums(left: list[float], right: list[float]) -> list[float]:
    return [one + other for one, other in zip(left, right, strict=True)]
