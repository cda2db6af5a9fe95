"""The model's tokenizer, and what turns a sample's token ids back into text. It runs in the frontend, never in the engine."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from common.errors import CheckpointError
from common.messages import FinishReason, SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """transformers' tokenizer of a checkpoint folder. Raises CheckpointError if the folder has none that can be used."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Tokenise as the checkpoint's tokenizer does by default, special tokens included."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def decode(self, token_ids: list[int], params: SamplingParams, reason: FinishReason | None = None) -> str:
        """Turn output tokens into text.

        The token that a finished sample stopped at is left out. A running one (`reason` is None) ends before a character
        that its last token has only begun.
        """
        if reason is not None and reason.type == "stop":
            token_ids = token_ids[:-1]
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        return text.rstrip(_REPLACEMENT) if reason is None else text
