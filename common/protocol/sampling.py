"""`sampling_params` of POST /generate: one object for each prompt, or one for all, read into `SamplingParams`.

It knows no model: `limits` checks token ids against the vocabulary. Neighbours: `generate` (the rest of the body),
`refusals` (known fields that cannot be honoured).
"""

from common.errors import RequestError
from common.ids import new_seed
from common.messages import SamplingParams
from common.protocol.bounds import (
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIAS_TOKENS,
    MAX_SAMPLES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from common.protocol.fields import Fields, as_integer, as_number, as_string, as_token_ids, check_count, kind_of
from common.protocol.refusals import SAMPLING_NEUTRALS, refuse_unsupported

_MAX_SEED = 2**63 - 1


def parse_sampling(name: str, value: object) -> SamplingParams:
    """Read one object of parameters; `name` is where it stands in the body. A missing seed is drawn.

    Raises RequestError with the field's name.
    """
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RequestError(name, f"must be an object, not {kind_of(value)}")
    fields = Fields(value, f"{name}.")
    refuse_unsupported(fields, SAMPLING_NEUTRALS)
    defaults = SamplingParams()
    max_new_tokens = fields.integer("max_new_tokens", defaults.max_new_tokens, ge=0)
    min_new_tokens = fields.integer("min_new_tokens", defaults.min_new_tokens, ge=0)
    if min_new_tokens > max_new_tokens:
        raise RequestError(
            fields.name("min_new_tokens"), f"{min_new_tokens} is more than max_new_tokens, {max_new_tokens}"
        )
    n = fields.integer("n", defaults.n, ge=1, le=MAX_SAMPLES)
    if n > 1 and max_new_tokens == 0:
        raise RequestError(fields.name("n"), "a prompt that is only scored (max_new_tokens 0) has one answer, not more")
    top_k = fields.integer("top_k", defaults.top_k, ge=-1)
    if top_k == 0:
        raise RequestError(fields.name("top_k"), "must be -1 (off) or at least 1, but is 0")
    return SamplingParams(
        n=n,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=fields.number("temperature", defaults.temperature, ge=0, le=1e6),
        top_p=fields.number("top_p", defaults.top_p, gt=0, le=1),
        top_k=top_k,
        min_p=fields.number("min_p", defaults.min_p, ge=0, le=1),
        frequency_penalty=fields.number("frequency_penalty", defaults.frequency_penalty, ge=-2, le=2),
        presence_penalty=fields.number("presence_penalty", defaults.presence_penalty, ge=-2, le=2),
        repetition_penalty=fields.number("repetition_penalty", defaults.repetition_penalty, gt=0, le=2),
        logit_bias=_logit_bias(fields),
        stop=_stop_strings(fields),
        no_stop_trim=fields.boolean("no_stop_trim", defaults.no_stop_trim),
        ignore_eos=fields.boolean("ignore_eos", defaults.ignore_eos),
        stop_token_ids=_stop_token_ids(fields),
        skip_special_tokens=fields.boolean("skip_special_tokens", defaults.skip_special_tokens),
        spaces_between_special_tokens=fields.boolean(
            "spaces_between_special_tokens", defaults.spaces_between_special_tokens
        ),
        seed=_seed(fields, n),
    )


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value, name = fields.values.get("stop"), fields.name("stop")
    if value is None or value == "":
        return ()
    if not isinstance(value, list):
        return (_stop_string(name, value),)
    check_count(name, len(value), MAX_STOP_STRINGS, "strings")
    stops = [_stop_string(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return tuple(dict.fromkeys(stops))


def _stop_string(name: str, value: object) -> str:
    stop = as_string(name, value)
    if not 0 < len(stop) <= MAX_STOP_CHARS:
        raise RequestError(name, f"must have 1 to {MAX_STOP_CHARS} characters, but has {len(stop)}")
    return stop


def _stop_token_ids(fields: Fields) -> tuple[int, ...]:
    value, name = fields.values.get("stop_token_ids"), fields.name("stop_token_ids")
    if value is None:
        return ()
    token_ids = as_token_ids(name, value)
    check_count(name, len(token_ids), MAX_STOP_TOKEN_IDS, "ids")
    return tuple(sorted(set(token_ids)))


def _logit_bias(fields: Fields) -> dict[int, float]:
    value, name = fields.values.get("logit_bias"), fields.name("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(name, f"must be an object of token ids and numbers, not {kind_of(value)}")
    check_count(name, len(value), MAX_LOGIT_BIAS_TOKENS, "tokens")
    bias: dict[int, float] = {}
    for key, item in value.items():
        # JSON's keys are strings; `isdecimal` alone would take digits of other scripts too.
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(name, f"{str(key)[:40]!r} is no token id")
        token_id = as_integer(name, int(key), ge=0, le=2**31 - 1)
        bias[token_id] = as_number(f"{name}.{key}", item, ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)
    return bias


def _seed(fields: Fields, n: int) -> int:
    """Read the first sample's seed; the last one's, n - 1 higher, must be a seed too."""
    value, most = fields.values.get("sampling_seed"), _MAX_SEED - (n - 1)
    return new_seed() % most if value is None else as_integer(fields.name("sampling_seed"), value, ge=0, le=most)
