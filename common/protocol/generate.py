"""The body of POST /generate, as typed samples: one `Sample` a prompt, however many answers it is to have.

It knows no model and no tokenizer: `limits.check_limits` checks a sample against a model once its prompt is tokenised.
Neighbours: `fields` (typed reading), `sampling` (sampling_params), `refusals` (known fields that cannot be honoured),
`replies` (the answers), `legs` (the same bodies, written by the router).
"""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from common.errors import RequestError
from common.ids import MAX_ROOM, new_rid
from common.messages import Bootstrap, RequestOptions, SamplingParams
from common.protocol.bounds import (
    MAX_HOST_CHARS,
    MAX_MESSAGES,
    MAX_NESTING,
    MAX_PROMPTS,
    MAX_RID_CHARS,
    MAX_TOP_LOGPROBS,
)
from common.protocol.fields import (
    Fields,
    Object,
    as_integer,
    as_string,
    as_token_ids,
    check_count,
    check_plain,
    decode_object,
    kind_of,
)
from common.protocol.refusals import REQUEST_NEUTRALS, refuse_unsupported
from common.protocol.sampling import parse_sampling

# Names and addresses; nothing that would mean more in a ZMQ endpoint.
_HOST: Final = re.compile(r"[0-9A-Za-z._:%-]+")

Message = Mapping[str, object]
Messages = tuple[Message, ...]
Prompt = str | tuple[int, ...] | Messages


class Sample(Struct, frozen=True, kw_only=True):
    """One prompt and all that was asked for it, for each of its `options.sampling.n` answers.

    Exactly one of `text`, `input_ids` and `messages` is there, and it is not empty. `chat_template_kwargs` belong to
    `messages`, which the worker's tokenizer renders.
    """

    rid: str
    options: RequestOptions
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] = {}
    bootstrap: Bootstrap | None = None
    routing_key: str | None = None
    """Prompts with one key go to one worker; the router reads it from a header, no worker sees it."""

    @property
    def prompt_field(self) -> Literal["text", "input_ids", "messages"]:
        """The field that the prompt came in, for messages about it."""
        if self.messages is not None:
            return "messages"
        return "text" if self.input_ids is None else "input_ids"


class GenerateCall(Struct, frozen=True):
    """A whole request. `is_list` says whether the answer is a list: for a list of prompts, even of one, and for n > 1."""

    samples: tuple[Sample, ...]
    is_list: bool
    stream: bool
    has_prompt_list: bool = False
    """Whether the prompts came as a list; a prefill leg, which answers each prompt once, replies a list only then."""

    @property
    def num_answers(self) -> int:
        """Answers in all: n of each prompt."""
        return sum(sample.options.sampling.n for sample in self.samples)


def parse_generate(body: bytes, *, allow_mixed_versions: bool = False) -> GenerateCall:
    """Read a request body; everything else is as for `read_generate`."""
    return read_generate(decode_object(body), allow_mixed_versions=allow_mixed_versions)


def read_generate(values: Object, *, allow_mixed_versions: bool = False) -> GenerateCall:
    """Read the fields of a request; `allow_mixed_versions` is for one that does not say.

    Ids and seeds that the client did not choose are drawn here. Raises RequestError, naming the field, for anything
    wrong that can be seen without a model.
    """
    fields = Fields(values)
    refuse_unsupported(fields, REQUEST_NEUTRALS)
    prompt_field, prompts, is_list = _prompts(fields)
    count = len(prompts)
    rids = _rids(fields.values.get("rid"), count, is_list=is_list)
    sampling = _sampling_params(fields.values.get("sampling_params"), count, is_list=is_list)
    bootstraps = _bootstraps(fields, [params.n for params in sampling], is_list=is_list)
    shared = _options(fields, allow_mixed_versions)
    _check_resumed(shared.resumed_tokens, prompt_field, prompts)
    template = _chat_template_kwargs(fields) if prompt_field == "messages" else {}
    samples = tuple(
        Sample(
            rid=rids[i],
            options=msgspec.structs.replace(shared, sampling=sampling[i]),
            bootstrap=bootstraps[i],
            chat_template_kwargs=template,
            **{prompt_field: prompt},  # type: ignore[arg-type]
        )
        for i, prompt in enumerate(prompts)
    )
    return GenerateCall(samples, is_list or sampling[0].n > 1, shared.stream, is_list)


# ------------------------------------------------------------------------------------------------ prompts


def _prompts(fields: Fields) -> tuple[str, list[Prompt], bool]:
    """Find the prompts: the field that they came in, the prompts, and whether they are a list."""
    given = [name for name in ("text", "input_ids", "messages") if fields.values.get(name) is not None]
    if not given:
        raise RequestError("text", "give the prompt as text, as input_ids or as messages")
    if len(given) > 1:
        raise RequestError(given[1], f"give either {given[0]} or {given[1]}, not both")
    value = fields.values[given[0]]
    match given[0]:
        case "text":
            return "text", *_text_prompts(value)
        case "input_ids":
            return "input_ids", *_id_prompts(value)
        case _:
            return "messages", [_messages(value)], False


def _text_prompts(text: object) -> tuple[list[Prompt], bool]:
    if isinstance(text, list):
        if not text:
            raise RequestError("text", "must not be an empty list")
        check_count("text", len(text), MAX_PROMPTS, "prompts")
        return [_non_empty(f"text[{i}]", as_string(f"text[{i}]", item)) for i, item in enumerate(text)], True
    return [_non_empty("text", as_string("text", text))], False


def _id_prompts(ids: object) -> tuple[list[Prompt], bool]:
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        check_count("input_ids", len(ids), MAX_PROMPTS, "prompts")
        return [
            _non_empty(f"input_ids[{i}]", as_token_ids(f"input_ids[{i}]", item)) for i, item in enumerate(ids)
        ], True
    return [_non_empty("input_ids", as_token_ids("input_ids", ids))], False


def _non_empty(name: str, prompt: Prompt) -> Prompt:
    if not prompt:
        raise RequestError(name, "the prompt must not be empty")
    return prompt


def _messages(value: object) -> Messages:
    """Read one conversation; what a message has besides its role and its content is the template's to use."""
    if not isinstance(value, list):
        raise RequestError("messages", f"must be a list of messages, not {kind_of(value)}")
    if not value:
        raise RequestError("messages", "the prompt must not be empty")
    check_count("messages", len(value), MAX_MESSAGES, "messages")
    for i, message in enumerate(value):
        if isinstance(message, list):
            raise RequestError(
                f"messages[{i}]", "must be a message; a request has one conversation, not a list of them"
            )
        if not isinstance(message, dict):
            raise RequestError(f"messages[{i}]", f"must be an object, not {kind_of(message)}")
        for name in ("role", "content"):
            as_string(f"messages[{i}].{name}", message.get(name))
        check_plain(f"messages[{i}]", message, nesting=MAX_NESTING)
    return tuple(value)


def _chat_template_kwargs(fields: Fields) -> dict[str, Any]:
    value = fields.values.get("chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError("chat_template_kwargs", f"must be an object, not {kind_of(value)}")
    check_plain("chat_template_kwargs", value, nesting=MAX_NESTING)
    return value


# ------------------------------------------------------------------------------------------------ everything else


def _rids(value: object, count: int, *, is_list: bool) -> list[str]:
    if value is None:
        return [new_rid() for _ in range(count)]
    if isinstance(value, list):
        rids = [_rid(f"rid[{i}]", item) for i, item in enumerate(_one_for_each("rid", value, count, is_list=is_list))]
        if len(set(rids)) != count:
            raise RequestError("rid", "must not name two samples alike")
        return rids
    rid = _rid("rid", value)
    return [f"{rid}_{i}" for i in range(count)] if is_list else [rid]


def _rid(name: str, value: object) -> str:
    rid = as_string(name, value)
    if not 0 < len(rid) <= MAX_RID_CHARS:
        raise RequestError(name, f"must have 1 to {MAX_RID_CHARS} characters, but has {len(rid)}")
    return rid


def _sampling_params(value: object, count: int, *, is_list: bool) -> list[SamplingParams]:
    if isinstance(value, list):
        items = _one_for_each("sampling_params", value, count, is_list=is_list)
        return [parse_sampling(f"sampling_params[{i}]", item) for i, item in enumerate(items)]
    # Without a seed of its own, each prompt of a list draws another one.
    return [parse_sampling("sampling_params", value) for _ in range(count)]


def _options(fields: Fields, allow_mixed_versions: bool) -> RequestOptions:
    """Read what all samples of a request share; its `sampling` is not read here."""
    wants_logprobs = fields.boolean("return_logprob", False)
    wants_rows = fields.boolean("return_routed_experts", False)
    form = fields.string("routed_experts_dtype", "int32")
    if form not in ("int32", "auto"):
        raise RequestError("routed_experts_dtype", f'must be "int32" or "auto", but is "{form[:40]}"')
    options = RequestOptions(
        stream=fields.boolean("stream", False),
        return_logprob=wants_logprobs,
        return_routed_experts=wants_rows,
        routed_experts_dtype="int32" if form == "int32" else "auto",
        data_parallel_rank=_data_parallel_rank(fields.values.get("data_parallel_rank")),
        allow_mixed_versions=fields.boolean("allow_mixed_versions", allow_mixed_versions),
        resumed_tokens=fields.integer("resumed_tokens", 0, ge=0),
        resumed_versions=_resumed_versions(fields.values.get("resumed_versions")),
    )
    # Without logprobs or rows, where they start means nothing, and a wrong start harms nobody.
    if wants_logprobs:
        options = msgspec.structs.replace(
            options,
            logprob_start_len=fields.integer("logprob_start_len", -1, ge=-1),
            top_logprobs_num=fields.integer("top_logprobs_num", 0, ge=0, le=MAX_TOP_LOGPROBS),
            return_text_in_logprobs=fields.boolean("return_text_in_logprobs", False),
        )
    if wants_rows:
        start = fields.integer("routed_experts_start_len", 0, ge=0)
        options = msgspec.structs.replace(options, routed_experts_start_len=start)
    return options


def _check_resumed(resumed_tokens: int, prompt_field: str, prompts: list[Prompt]) -> None:
    """Check that there is a prompt before the tokens that are resumed."""
    if resumed_tokens == 0:
        return
    if prompt_field != "input_ids":
        raise RequestError("resumed_tokens", f"are the last ones of input_ids; the prompt came as {prompt_field}")
    num_tokens = min(map(len, prompts))
    if resumed_tokens >= num_tokens:
        raise RequestError("resumed_tokens", f"{resumed_tokens} leave no prompt of {num_tokens} input_ids")


def _resumed_versions(value: object) -> tuple[str, ...]:
    """Read which weights earlier legs had."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError("resumed_versions", f"must be a list of strings, but is {kind_of(value)}")
    return tuple(as_string("resumed_versions", version) for version in value)


def _data_parallel_rank(value: object) -> int | None:
    """Read which group is to have the request; how many there are is checked where it is known."""
    return None if value is None else as_integer("data_parallel_rank", value, ge=0, le=2**31 - 1)


def _bootstraps(fields: Fields, ns: list[int], *, is_list: bool) -> list[Bootstrap | None]:
    """Read where each prompt's other leg is; `ns` are the prompts' numbers of answers, each of which has a room."""
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    given = [fields.values.get(name) for name in names]
    if all(value is None for value in given):
        return [None] * len(ns)
    for name, value in zip(names, given, strict=True):
        if value is None:
            raise RequestError(name, f"is missing; {', '.join(names)} belong together")
    hosts, ports = (
        _one_for_each(name, value, len(ns), is_list=is_list) if isinstance(value, list) else [value] * len(ns)
        for name, value in zip(names[:2], given[:2], strict=True)
    )
    rooms = _rooms(given[2], ns, is_list=is_list)
    if len({room for mine in rooms for room in mine}) != sum(ns):
        raise RequestError("bootstrap_room", "each sample needs a room of its own")
    return [
        Bootstrap(_host(host), as_integer("bootstrap_port", port, ge=1, le=65535), mine)
        for host, port, mine in zip(hosts, ports, rooms, strict=True)
    ]


def _host(value: object) -> str:
    host = as_string("bootstrap_host", value)
    if len(host) > MAX_HOST_CHARS:
        raise RequestError("bootstrap_host", f"has {len(host)} characters, more than {MAX_HOST_CHARS}")
    if _HOST.fullmatch(host) is None:
        raise RequestError("bootstrap_host", "is neither the name of a host nor an address")
    return host


def _rooms(value: object, ns: list[int], *, is_list: bool) -> list[tuple[int, ...]]:
    """Read `bootstrap_room`: a room for a prompt with one answer, a list of n rooms for one with more."""
    values = [value]
    if is_list:
        values = _one_for_each("bootstrap_room", value, len(ns), is_list=True) if isinstance(value, list) else values
        if len(values) != len(ns):
            raise RequestError("bootstrap_room", "each sample needs a room of its own")
    rooms: list[tuple[int, ...]] = []
    for n, item in zip(ns, values, strict=True):
        if isinstance(item, list) and n > 1:
            if len(item) != n:
                raise RequestError("bootstrap_room", f"has {len(item)} rooms for {n} samples")
            rooms.append(tuple(as_integer("bootstrap_room", room, ge=1, le=MAX_ROOM) for room in item))
        elif n > 1:
            raise RequestError("bootstrap_room", f"must be a list of {n} rooms, since n is {n}, not {kind_of(item)}")
        else:
            rooms.append((as_integer("bootstrap_room", item, ge=1, le=MAX_ROOM),))
    return rooms


def _one_for_each(name: str, values: list[object], count: int, *, is_list: bool) -> list[object]:
    if not is_list:
        raise RequestError(name, "must not be a list when there is one prompt that is not in a list")
    if len(values) != count:
        raise RequestError(name, f"has {len(values)} entries for {count} prompts")
    return values
