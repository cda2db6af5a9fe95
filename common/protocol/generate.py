"""The body of POST /generate, as typed samples.

It knows no model and no tokenizer: `limits.check_limits` checks a sample against a model once its prompt is tokenised.
Neighbours: `fields` (typed reading), `refusals` (known fields that cannot be honoured), `replies` (the answers),
`legs` (the same bodies, written by the router).
"""

from typing import Literal

from msgspec import Struct

from common.errors import RequestError
from common.ids import MAX_ROOM, new_rid, new_seed
from common.messages import Bootstrap, RequestOptions, SamplingParams
from common.protocol.fields import Fields, as_integer, as_string, as_token_ids, decode_object, kind_of
from common.protocol.refusals import REQUEST_NEUTRALS, SAMPLING_NEUTRALS, refuse_unsupported

MAX_RID_CHARS = 512


class Sample(Struct, frozen=True, kw_only=True):
    """One prompt and all that was asked for it; exactly one of `text` and `input_ids` is there, and it is not empty."""

    rid: str
    options: RequestOptions
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    bootstrap: Bootstrap | None = None

    @property
    def prompt_field(self) -> Literal["text", "input_ids"]:
        """The field that the prompt came in, for messages about it."""
        return "text" if self.input_ids is None else "input_ids"


class GenerateCall(Struct, frozen=True):
    """A whole request. `is_list` says whether the answer is a list, which it also is for a list of one prompt."""

    samples: tuple[Sample, ...]
    is_list: bool
    stream: bool


def parse_generate(body: bytes) -> GenerateCall:
    """Read a request body.

    Ids and seeds that the client did not choose are drawn here. Raises RequestError, naming the field, for anything
    wrong that can be seen without a model.
    """
    fields = Fields(decode_object(body))
    refuse_unsupported(fields, REQUEST_NEUTRALS)
    prompts, is_list = _prompts(fields)
    count = len(prompts)
    rids = _rids(fields.values.get("rid"), count, is_list=is_list)
    sampling = _sampling_params(fields.values.get("sampling_params"), count, is_list=is_list)
    bootstraps = _bootstraps(fields, count, is_list=is_list)
    shared = _options(fields)
    samples = tuple(
        Sample(
            rid=rids[i],
            options=RequestOptions(
                sampling=sampling[i],
                stream=shared.stream,
                return_logprob=shared.return_logprob,
                return_routed_experts=shared.return_routed_experts,
                routed_experts_start_len=shared.routed_experts_start_len,
                routed_experts_dtype=shared.routed_experts_dtype,
            ),
            text=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            bootstrap=bootstraps[i],
        )
        for i, prompt in enumerate(prompts)
    )
    return GenerateCall(samples, is_list, shared.stream)


def _prompts(fields: Fields) -> tuple[list[str | tuple[int, ...]], bool]:
    text, ids = fields.values.get("text"), fields.values.get("input_ids")
    if text is not None and ids is not None:
        raise RequestError("input_ids", "give either text or input_ids, not both")
    if text is not None:
        return _text_prompts(text)
    if ids is not None:
        return _id_prompts(ids)
    raise RequestError("text", "give the prompt as text or as input_ids")


def _text_prompts(text: object) -> tuple[list[str | tuple[int, ...]], bool]:
    if isinstance(text, list):
        if not text:
            raise RequestError("text", "must not be an empty list")
        return [_non_empty(f"text[{i}]", as_string(f"text[{i}]", item)) for i, item in enumerate(text)], True
    return [_non_empty("text", as_string("text", text))], False


def _id_prompts(ids: object) -> tuple[list[str | tuple[int, ...]], bool]:
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return [
            _non_empty(f"input_ids[{i}]", as_token_ids(f"input_ids[{i}]", item)) for i, item in enumerate(ids)
        ], True
    return [_non_empty("input_ids", as_token_ids("input_ids", ids))], False


def _non_empty(name: str, prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
    if not prompt:
        raise RequestError(name, "the prompt must not be empty")
    return prompt


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
        return [_one_sampling_params(f"sampling_params[{i}]", item) for i, item in enumerate(items)]
    # Without a seed of its own, each prompt of a list draws another one.
    return [_one_sampling_params("sampling_params", value) for _ in range(count)]


def _one_sampling_params(name: str, value: object) -> SamplingParams:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RequestError(name, f"must be an object, not {kind_of(value)}")
    fields = Fields(value, f"{name}.")
    refuse_unsupported(fields, SAMPLING_NEUTRALS)
    top_k = fields.integer("top_k", -1, ge=-1)
    if top_k == 0:
        raise RequestError(fields.name("top_k"), "must be -1 (off) or at least 1, but is 0")
    defaults = SamplingParams()
    stop_token_ids = value.get("stop_token_ids")
    seed = value.get("sampling_seed")
    return SamplingParams(
        max_new_tokens=fields.integer("max_new_tokens", defaults.max_new_tokens, ge=0),
        temperature=fields.number("temperature", defaults.temperature, ge=0, le=1e6),
        top_p=fields.number("top_p", defaults.top_p, gt=0, le=1),
        top_k=top_k,
        min_p=fields.number("min_p", defaults.min_p, ge=0, le=1),
        ignore_eos=fields.boolean("ignore_eos", defaults.ignore_eos),
        stop_token_ids=()
        if stop_token_ids is None
        else tuple(sorted(set(as_token_ids(fields.name("stop_token_ids"), stop_token_ids)))),
        skip_special_tokens=fields.boolean("skip_special_tokens", defaults.skip_special_tokens),
        spaces_between_special_tokens=fields.boolean(
            "spaces_between_special_tokens", defaults.spaces_between_special_tokens
        ),
        seed=new_seed() if seed is None else as_integer(fields.name("sampling_seed"), seed, ge=0, le=2**63 - 1),
    )


def _options(fields: Fields) -> RequestOptions:
    """Read what all samples of a request share; its `sampling` is not read here."""
    wants_rows = fields.boolean("return_routed_experts", False)
    form = fields.string("routed_experts_dtype", "int32")
    if form not in ("int32", "auto"):
        raise RequestError("routed_experts_dtype", f'must be "int32" or "auto", but is "{form[:40]}"')
    return RequestOptions(
        stream=fields.boolean("stream", False),
        return_logprob=fields.boolean("return_logprob", False),
        return_routed_experts=wants_rows,
        # Without rows the start means nothing, and a wrong one harms nobody.
        routed_experts_start_len=fields.integer("routed_experts_start_len", 0, ge=0) if wants_rows else 0,
        routed_experts_dtype="int32" if form == "int32" else "auto",
    )


def _bootstraps(fields: Fields, count: int, *, is_list: bool) -> list[Bootstrap | None]:
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    given = [fields.values.get(name) for name in names]
    if all(value is None for value in given):
        return [None] * count
    for name, value in zip(names, given, strict=True):
        if value is None:
            raise RequestError(name, f"is missing; {', '.join(names)} belong together")
    hosts, ports, rooms = (
        _one_for_each(name, value, count, is_list=is_list) if isinstance(value, list) else [value] * count
        for name, value in zip(names, given, strict=True)
    )
    bootstraps = [
        Bootstrap(
            as_string("bootstrap_host", host),
            as_integer("bootstrap_port", port, ge=1, le=65535),
            as_integer("bootstrap_room", room, ge=0, le=MAX_ROOM),
        )
        for host, port, room in zip(hosts, ports, rooms, strict=True)
    ]
    if len({bootstrap.room for bootstrap in bootstraps}) != count:
        raise RequestError("bootstrap_room", "each sample needs a room of its own")
    return list(bootstraps)


def _one_for_each(name: str, values: list[object], count: int, *, is_list: bool) -> list[object]:
    if not is_list:
        raise RequestError(name, "must not be a list when there is one prompt that is not in a list")
    if len(values) != count:
        raise RequestError(name, f"has {len(values)} entries for {count} prompts")
    return values
