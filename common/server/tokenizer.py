"""The model's tokenizer: prompts into ids, and ids into text. It runs in the frontend, never in the engine.

It knows no request and no stream; neighbour: `detokenizer`, which turns tokens into text as they come.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import CheckpointError, RequestError

_CACHED_TEXTS = 2**16
# The library's calls for batches let go of the interpreter lock, and its other ones do not: 38 ms for 100 KB of text.
_SHORT_TOKENS = 256


class Tokenizer:
    """A transformers tokenizer that is backed by the tokenizers library.

    Its methods may be called from several threads. Text is never "cleaned up" (no space is taken away before
    punctuation), so that the text of tokens does not depend on those that follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer: Any = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._special = {
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        }
        self._text_of = lru_cache(_CACHED_TEXTS)(lambda token_id: self.decode([token_id], skip_special_tokens=False))
        # A call of transformers' own sets the backend's truncation and padding to none, whatever its file says.
        tokenizer("")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load a checkpoint folder's tokenizer. Raises CheckpointError if it has none that can be used."""
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no usable tokenizer: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(f"{folder}: no usable tokenizer: {type(tokenizer).__name__} has no tokenizer.json")
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokenise as the checkpoint's tokenizer does by default, special tokens included."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, object]], template_kwargs: Mapping[str, Any]) -> list[int]:
        """Render a conversation with the checkpoint's chat template, up to where the answer begins, and tokenise it.

        Raises RequestError if there is no template, if it refuses the conversation, or if `template_kwargs` has a name that
        is not the template's.
        """
        render = self._tokenizer.apply_chat_template
        if self._tokenizer.chat_template is None:
            raise RequestError("messages", "this model has no chat template; send text or input_ids")
        for name in template_kwargs:
            if name in inspect.signature(render).parameters:
                raise RequestError("chat_template_kwargs", f"{name!r} is not for the template")
        try:
            text = render(list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError("messages", f"the chat template refuses them: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn tokens into text; bytes that are no whole character become U+FFFD."""
        if len(token_ids) <= _SHORT_TOKENS:
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            [text] = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    def text_of(self, token_id: int) -> str:
        """Give the text of one token by itself, special or not."""
        return self._text_of(token_id)

    def is_special(self, token_id: int) -> bool:
        """Say whether this is a special token, which `skip_special_tokens` leaves out."""
        return token_id in self._special

    def is_silent(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Say whether the token has no text anywhere: a special one that is skipped, or an id without a token."""
        is_skipped = skip_special_tokens and token_id in self._special
        return is_skipped or self._backend.id_to_token(token_id) is None

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids
