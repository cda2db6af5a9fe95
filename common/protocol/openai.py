"""The bodies of POST /v1/completions and /v1/chat/completions, translated to /generate's.

OpenAI's fields become /generate's by name, and /generate's parser reads them: one set of defaults and bounds. What it finds
wrong is told by the name that the client used. Neighbours: `generate` (the parser), `openai_replies` (the answers).
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from common.errors import RequestError
from common.ids import new_rid
from common.messages import ErrorReport
from common.protocol.bounds import MAX_MESSAGES, MAX_MODEL_CHARS
from common.protocol.fields import Fields, as_integer, as_string, check_count, decode_object, kind_of
from common.protocol.generate import GenerateCall, read_generate
from common.protocol.refusals import REQUEST_NEUTRALS, SAMPLING_NEUTRALS, refuse_unsupported
from common.protocol.replies import Reply, error_fields

DEFAULT_COMPLETION_TOKENS: Final = 16
DEFAULT_CHAT_TOKENS: Final = 128

_Names = Mapping[str, str]

# OpenAI's name, or our own for what OpenAI lacks, and the name in `sampling_params`.
_SAMPLING: Final[_Names] = {
    "n": "n",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "sampling_seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_token_ids",
    "skip_special_tokens": "skip_special_tokens",
    "spaces_between_special_tokens": "spaces_between_special_tokens",
    "no_stop_trim": "no_stop_trim",
    **{name: name for name in SAMPLING_NEUTRALS},
}
# The same for the rest of the body.
_REQUEST: Final = (
    "stream",
    "return_routed_experts",
    "routed_experts_start_len",
    "routed_experts_dtype",
    "data_parallel_rank",
    "allow_mixed_versions",
    *REQUEST_NEUTRALS,
)
# OpenAI's fields that are not for here, with the values that ask for nothing.
_NEUTRALS: Final[dict[str, tuple[object, ...]]] = {
    "echo": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": ("text",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "moderation": (),
}
_FIELD_OF_MESSAGE: Final = re.compile(r"([\w.\[\]]+): ")
_BASE_OF_FIELD: Final = re.compile(r"(?:sampling_params\.)?(\w+)(.*)", re.DOTALL)


class OpenAICall(Struct, frozen=True, kw_only=True):
    """A whole request: what is to be generated, and how the answer is to look."""

    generate: GenerateCall
    id: str
    model: str
    is_chat: bool
    return_logprob: bool
    num_top_logprobs: int
    include_usage: bool
    return_meta_info: bool


class Renames(Struct, frozen=True):
    """Gives the fields in an error about /generate's body the names that they had in OpenAI's."""

    names: dict[str, str]

    def apply(self, message: str) -> tuple[str | None, str]:
        """Find the field that a message begins with: its name as the client knows it, and the message with that name."""
        found = _FIELD_OF_MESSAGE.match(message)
        if found is None:
            return None, message
        parts = _BASE_OF_FIELD.match(found[1])
        if parts is None:
            return None, message
        name = self.names.get(parts[1], parts[1])
        return name, f"{name}{parts[2]}: {message[found.end() :]}"


COMPLETION_RENAMES: Final = Renames(
    {theirs: ours for ours, theirs in _SAMPLING.items()}
    | {"text": "prompt", "input_ids": "prompt", "max_new_tokens": "max_tokens", "top_logprobs_num": "logprobs"}
)
CHAT_RENAMES: Final = Renames(
    {theirs: ours for ours, theirs in _SAMPLING.items()}
    | {"max_new_tokens": "max_completion_tokens", "top_logprobs_num": "top_logprobs"}
)


def parse_completion(body: bytes, *, allow_mixed_versions: bool = False) -> OpenAICall:
    """Read a body of POST /v1/completions; `allow_mixed_versions` is for one that does not say.

    Raises RequestError, its field named as in /generate's body or in this one.
    """
    fields = Fields(decode_object(body))
    num_top: int | None = None
    if (value := fields.values.get("logprobs")) is not None:
        num_top = as_integer("logprobs", value, ge=0, le=2**31 - 1)
    max_tokens = _first_given(fields, "max_tokens", "max_completion_tokens", default=DEFAULT_COMPLETION_TOKENS)
    prompt = _completion_prompt(fields)
    return _call(fields, prompt, max_tokens, num_top, is_chat=False, allow_mixed_versions=allow_mixed_versions)


def parse_chat(body: bytes, *, allow_mixed_versions: bool = False) -> OpenAICall:
    """Read a body of POST /v1/chat/completions. Everything else is as for `parse_completion`."""
    fields = Fields(decode_object(body))
    num_top: int | None = fields.integer("top_logprobs", 0, ge=0)
    wants_logprobs = fields.boolean("logprobs", False)
    if num_top and not wants_logprobs:
        raise RequestError("top_logprobs", "needs logprobs to be true")
    max_tokens = _first_given(fields, "max_completion_tokens", "max_tokens", default=DEFAULT_CHAT_TOKENS)
    prompt, num_top = _chat_prompt(fields), (num_top if wants_logprobs else None)
    return _call(fields, prompt, max_tokens, num_top, is_chat=True, allow_mixed_versions=allow_mixed_versions)


def openai_error(report: ErrorReport, renames: Renames) -> Reply:
    """Build `{"error": {...}}` as OpenAI does: ours, and the field that is wrong as `param`."""
    param = None
    if report.status == 400:
        param, message = renames.apply(report.message)
        report = msgspec.structs.replace(report, message=message)
    body = error_fields(report)
    error = body["error"]
    assert isinstance(error, dict)
    error["param"] = param
    return body


def _call(
    fields: Fields,
    prompt: dict[str, object],
    max_tokens: int,
    num_top: int | None,
    *,
    is_chat: bool,
    allow_mixed_versions: bool,
) -> OpenAICall:
    refuse_unsupported(fields, _NEUTRALS)
    values = fields.values
    _check_best_of(values.get("best_of"), values.get("n"))
    stream_options = values.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise RequestError("stream_options", f"must be an object, not {kind_of(stream_options)}")
    rid = values.get("rid")
    if rid is None:
        rid = f"{'chatcmpl' if is_chat else 'cmpl'}-{new_rid()}"
    body: dict[str, object] = {
        **{name: values[name] for name in _REQUEST if name in values},
        **prompt,
        "rid": rid,
        "return_logprob": num_top is not None,
        "top_logprobs_num": num_top or 0,
        "return_text_in_logprobs": True,
        "sampling_params": {
            **{theirs: values[ours] for ours, theirs in _SAMPLING.items() if ours in values},
            "max_new_tokens": max_tokens,
        },
    }
    call = read_generate(body, allow_mixed_versions=allow_mixed_versions)
    model = fields.string("model", "default")
    check_count("model", len(model), MAX_MODEL_CHARS, "characters")
    return OpenAICall(
        generate=call,
        id=rid if isinstance(rid, str) else call.samples[0].rid,
        model=model,
        is_chat=is_chat,
        return_logprob=num_top is not None,
        num_top_logprobs=num_top or 0,
        include_usage=call.stream and Fields(stream_options or {}, "stream_options.").boolean("include_usage", False),
        return_meta_info=fields.boolean("return_meta_info", False),
    )


def _completion_prompt(fields: Fields) -> dict[str, object]:
    """Tell texts from token ids; /generate's parser checks the rest."""
    prompt = fields.values.get("prompt")
    if prompt is None:
        raise RequestError("prompt", "give a text, token ids, or a list of either")
    if not isinstance(prompt, str | list):
        raise RequestError("prompt", f"must be a string or a list, not {kind_of(prompt)}")
    is_text = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], str))
    return {"text" if is_text else "input_ids": prompt}


def _chat_prompt(fields: Fields) -> dict[str, object]:
    """Take the token ids if there are any: whoever sends them too has applied the template to the messages already."""
    input_ids = fields.values.get("input_ids")
    if input_ids is not None:
        if isinstance(input_ids, list) and any(isinstance(item, list) for item in input_ids):
            raise RequestError("input_ids", "must be the ids of one prompt, not a list of prompts")
        return {"input_ids": input_ids}
    messages = fields.values.get("messages")
    if messages is None:
        raise RequestError("messages", "give the conversation, or the ids of its tokens as input_ids")
    if isinstance(messages, list):
        messages = [_plain(f"messages[{i}]", message) for i, message in enumerate(messages)]
    return {"messages": messages, "chat_template_kwargs": fields.values.get("chat_template_kwargs")}


def _plain(name: str, message: object) -> object:
    """Join a message's parts, which must be texts, with a space between them, as SGLang does."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    check_count(name, len(message["content"]), MAX_MESSAGES, "parts")
    texts = []
    for i, part in enumerate(message["content"]):
        place = f"{name}.content[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(place, "only parts of type text are supported here")
        texts.append(as_string(f"{place}.text", part.get("text")))
    return {**message, "content": " ".join(texts)}


def _check_best_of(best_of: object, n: object) -> None:
    """`best_of` asks for nothing if it is no more than `n`."""
    if best_of is not None and not (type(best_of) is int and best_of == (1 if n is None else n)):
        raise RequestError("best_of", "is not supported here; leave it out")


def _first_given(fields: Fields, *names: str, default: int) -> int:
    """Read one number that has several names, the better one first."""
    for name in names:
        if fields.values.get(name) is not None:
            return fields.integer(name, default, ge=0)
    return default
