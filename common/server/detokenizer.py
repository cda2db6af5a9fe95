"""Text of tokens as they come, and the stop strings in it; linear in the output, whatever the tokens are.

    tokens --Detokenizer--> certain text --StopStrings--> a match, or how much of the end may become one

The text after k tokens is a prefix of the text after all of them: a character that is only begun is held back, and so is the
beginning of a stop string. It knows no request and no engine. Neighbours: `tokenizer` (whole decoding), `output` (the user).
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from common.errors import RequestError
from common.messages import SamplingParams
from common.server.tokenizer import Tokenizer

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

# An unfinished character is at most three bytes, and shows as at most three replacement characters: as one in byte-level
# vocabularies, as one a byte in those that fall back to bytes.
_MAX_UNFINISHED = 3
# Tokens that are decoded together at most, as long as they have text.
_WINDOW_TOKENS = 24


class Detokenizer:
    """One sample's tokens into text.

    The last few tokens are decoded again with each new one, since a character may span tokens and a token's text may depend
    on the one before it. Once everything is certain the window moves on; in a run of bytes that never become a character it
    moves on where decoding the two sides apart gives the same text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_old = 0
        """Tokens at the window's start that are there only for the text of those after them."""
        self._num_given = 0
        """Characters of the window's text that have been given out."""
        self.unfinished = ""
        """What is held back: it would be the end of the text if no token came any more."""

    def push(self, token_id: int) -> str:
        """Take a token; returns the text that has become certain."""
        if self._tokenizer.is_silent(token_id, skip_special_tokens=self._skip):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = len(text) - _num_trailing_replacements(text)
        given, self._num_given = self._num_given, max(self._num_given, certain)
        self.unfinished = text[self._num_given :]
        if not self.unfinished:
            del self._window[: self._num_old]
            self._num_old = len(self._window)
            self._num_given = len(self._decode(self._window))
        elif len(self._window) % _WINDOW_TOKENS == 0:
            self._move_on(text)
        return text[given:certain]

    def finish(self) -> str:
        """Say that no token will come; returns what was held back."""
        rest, self.unfinished = self.unfinished, ""
        return rest

    def _move_on(self, text: str) -> None:
        """Forget the window's first half, at a place between two characters."""
        half = _WINDOW_TOKENS // 2
        for cut in range(half, half - _MAX_UNFINISHED - 2, -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if left + right == text and right and len(left) <= self._num_given:
                del self._window[:cut]
                self._num_old = max(0, self._num_old - cut)
                self._num_given -= len(left)
                return

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class Match(NamedTuple):
    """A stop string and where in the text it begins."""

    stop: str
    start: int


class StopStrings:
    """Finds the first of some strings to be complete in a text that comes in pieces, in one pass (Knuth, Morris, Pratt).

    The result does not depend on how the text is cut: of two strings that overlap, the one that ends first is found, and of
    two that end together the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._num_seen = 0

    @property
    def num_held(self) -> int:
        """How many characters at the text's end are the beginning of a stop string."""
        return max((search.num_matched for search in self._searches), default=0)

    def push(self, text: str) -> Match | None:
        """Take the next piece; returns the match that it completes. Nothing may be pushed after a match."""
        if not self._searches:
            return None
        for character in text:
            self._num_seen += 1
            matches = [search.stop for search in self._searches if search.step(character)]
            if matches:
                return Match(matches[0], self._num_seen - len(matches[0]))
        return None


class _Search:
    """How much of one string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        # shorter[k]: the longest proper prefix of the string that its first k characters end with.
        self._shorter = [0, 0]
        k = 0
        for character in stop[1:]:
            while k and stop[k] != character:
                k = self._shorter[k]
            k += stop[k] == character
            self._shorter.append(k)

    def step(self, character: str) -> bool:
        """Take a character; says whether the string is complete."""
        k = self.num_matched
        while k and self.stop[k] != character:
            k = self._shorter[k]
        self.num_matched = k + (self.stop[k] == character)
        return self.num_matched == len(self.stop)


class Stop(NamedTuple):
    """A stop string that ends a sample after its first `num_tokens` tokens."""

    num_tokens: int
    matched: str


class OutputText:
    """One sample's text: what may be shown of it at any time, where it stops, and what it is in the end.

    `resumed_ids` are the tokens that it begins with, which have been generated before. Raises RequestError if they have a stop
    string already.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, resumed_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._tokens = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop)
        self._pieces: list[str] = []
        self._num_chars = 0
        self._num_tokens = 0
        self._match: Match | None = None
        # The text without the last token, which is not shown if it turns out to be why the sample stopped.
        self._num_chars_before = 0
        self._unfinished_before = ""
        self._may_be_stop_token = False
        for token_id in resumed_ids:
            if (stop := self.push(token_id)) is not None:
                raise RequestError("resumed_tokens", f"their text has the stop string {stop.matched!r}")
        # A stop is told by the number of new tokens.
        self._num_tokens = 0

    def push(self, token_id: int) -> Stop | None:
        """Take a token; returns a stop if it completes a stop string. Nothing may be pushed after that."""
        assert self._match is None, "the sample has stopped"
        self._num_tokens += 1
        self._num_chars_before, self._unfinished_before = self._num_chars, self._tokens.unfinished
        self._may_be_stop_token = token_id in self._params.stop_token_ids or self._tokenizer.is_special(token_id)
        return self._add(self._tokens.push(token_id))

    def visible(self) -> str:
        """Give the text that is certain to be part of the final one."""
        text = self._joined()
        if self._params.no_stop_trim:
            return text
        if self._match is not None:
            return text[: self._match.start]
        num_chars = self._num_chars - self._stops.num_held
        return text[: min(num_chars, self._num_chars_before) if self._may_be_stop_token else num_chars]

    def finish(self) -> Stop | None:
        """Say that no token will come; returns a stop if what was held back completes a stop string."""
        return None if self._match is not None or self._num_tokens == 0 else self._add(self._tokens.finish())

    def final(self, *, at_stop_token: bool) -> str:
        """Give the whole text, once `finish` was called: without a stop string and what follows it, or a stop token."""
        text = self._joined()
        if self._params.no_stop_trim:
            return text + self._tokens.finish()
        if self._match is not None:
            return text[: self._match.start]
        return text[: self._num_chars_before] + self._unfinished_before if at_stop_token else text

    def _add(self, text: str) -> Stop | None:
        self._pieces.append(text)
        self._num_chars += len(text)
        self._match = self._stops.push(text)
        return None if self._match is None else Stop(self._num_tokens, self._match.stop)

    def _joined(self) -> str:
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]


def _num_trailing_replacements(text: str) -> int:
    """Count the replacement characters at the end, as far as they may belong to a character that is only begun."""
    tail = text[-_MAX_UNFINISHED:]
    return len(tail) - len(tail.rstrip(REPLACEMENT))
