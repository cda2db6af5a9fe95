"""The known fields that cannot be honoured yet, with the values that ask for nothing.

A request that sets one of them to anything else is refused: dropping it in silence would answer another question than
the one asked. Fields that are not known at all are ignored. Neighbour: `generate`.
"""

from typing import Final

from common.errors import RequestError
from common.protocol.fields import Fields

# `null` is neutral everywhere, and so is a list of neutral values (one for each prompt).
REQUEST_NEUTRALS: Final[dict[str, tuple[object, ...]]] = {
    "lora_path": (),
    "lora_id": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "input_embeds": (),
    "session_params": (),
    "session_id": (),
    "custom_logit_processor": (),
    "return_hidden_states": (False,),
    "response_format": ({"type": "text"},),
    "tools": (),
    "beam_width": (0, 1),
    "token_ids_logprob": (),
}

SAMPLING_NEUTRALS: Final[dict[str, tuple[object, ...]]] = {
    "beam_width": (0, 1),
    "stop_regex": ("",),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
    "custom_params": ({},),
}


def refuse_unsupported(fields: Fields, neutrals: dict[str, tuple[object, ...]]) -> None:
    """Raise RequestError for the first known field that asks for something that is not there."""
    for name, neutral in neutrals.items():
        value = fields.values.get(name)
        if value is not None and not _is_neutral(value, neutral):
            raise RequestError(fields.name(name), "is not supported here; leave it out")


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    values = value if isinstance(value, list) else [value]
    # False == 0 and True == 1 in Python, but not on the wire.
    return all(
        one in (None, []) or any(one == item and isinstance(one, bool) == isinstance(item, bool) for item in neutral)
        for one in values
    )
