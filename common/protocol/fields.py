"""Reading typed values out of a decoded JSON object, with an error that names the field for whatever does not fit.

`null` means "not given", as the clients of this dialect use it. It knows no field by name. Neighbour: `generate`.
"""

from collections.abc import Mapping

import msgspec

from common.errors import RequestError

Object = Mapping[str, object]


def decode_object(body: bytes) -> Object:
    """Decode a request body that must be one JSON object; NaN and Infinity are not JSON."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("body", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("body", f"must be a JSON object, not {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """Name a value's JSON type for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return f"the number {value}" if abs(value) < 1e18 else "a huge number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


class Fields:
    """The fields of one object. `prefix` is where the object stands in the body, for example `sampling_params.`."""

    def __init__(self, values: Object, prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def name(self, field: str) -> str:
        """Name a field as the client finds it in the body."""
        return self.prefix + field

    def boolean(self, field: str, default: bool) -> bool:
        """Read true or false."""
        value = self.values.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise RequestError(self.name(field), f"must be true or false, not {kind_of(value)}")
        return value

    def integer(self, field: str, default: int, *, ge: int, le: int = 2**31 - 1) -> int:
        """Read an integer in `[ge, le]`."""
        value = self.values.get(field)
        return default if value is None else as_integer(self.name(field), value, ge=ge, le=le)

    def number(
        self, field: str, default: float, *, ge: float | None = None, gt: float | None = None, le: float | None = None
    ) -> float:
        """Read a number within the bounds that are given."""
        value = self.values.get(field)
        return default if value is None else as_number(self.name(field), value, ge=ge, gt=gt, le=le)

    def string(self, field: str, default: str) -> str:
        """Read a string."""
        value = self.values.get(field)
        if value is None:
            return default
        return as_string(self.name(field), value)


def as_integer(name: str, value: object, *, ge: int, le: int) -> int:
    """Take an integer in `[ge, le]`; true, false and 1.0 are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, f"must be an integer, not {kind_of(value)}")
    if not ge <= value <= le:
        raise RequestError(name, f"must be in [{ge}, {le}], but is {value if abs(value) < 2**64 else 'far outside'}")
    return value


def as_number(
    name: str, value: object, *, ge: float | None = None, gt: float | None = None, le: float | None = None
) -> float:
    """Take a number within the bounds that are given."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(name, f"must be a number, not {kind_of(value)}")
    # An integer too large for a float is out of every bound; comparing it is exact, converting it would raise.
    if (ge is not None and value < ge) or (gt is not None and value <= gt) or (le is not None and value > le):
        bounds = [f"{sign} {bound}" for sign, bound in ((">=", ge), (">", gt), ("<=", le)) if bound is not None]
        raise RequestError(name, f"must be {' and '.join(bounds)}, but is {value if abs(value) < 1e18 else 'huge'}")
    return float(value)


def as_string(name: str, value: object) -> str:
    """Take a string."""
    if not isinstance(value, str):
        raise RequestError(name, f"must be a string, not {kind_of(value)}")
    return value


def check_count(name: str, count: int, most: int, what: str) -> None:
    """Refuse a field that has more of something than one request may have."""
    if count > most:
        raise RequestError(name, f"has {count} {what}, more than {most}")


def check_plain(name: str, value: object, *, nesting: int) -> None:
    """Check what is passed on as it is: so many lists and objects inside of each other at most, integers of 64 bits."""
    match value:
        case bool():
            pass
        case int() if not -(2**63) <= value < 2**64:
            raise RequestError(name, "holds an integer of more than 64 bits")
        case dict() | list():
            if nesting == 0:
                raise RequestError(name, "is nested too deeply")
            for item in value.values() if isinstance(value, dict) else value:
                check_plain(name, item, nesting=nesting - 1)


def as_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Take a list of ids, each in `[0, 2**31)`; the vocabulary's own bound is checked where it is known."""
    if not isinstance(value, list):
        raise RequestError(name, f"must be a list of token ids, not {kind_of(value)}")
    # min and max reject long bad prompts at C speed; only a failure pays for naming the culprit.
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**31):
        for index, token_id in enumerate(value):
            as_integer(f"{name}[{index}]", token_id, ge=0, le=2**31 - 1)
    return tuple(value)
