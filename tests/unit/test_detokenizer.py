"""Text as it grows: against the tokenizer's own decoding of all the tokens, whatever the tokens are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import RequestError
from common.messages import SamplingParams
from common.server.detokenizer import REPLACEMENT, Detokenizer, OutputText, Stop, StopStrings
from common.server.tokenizer import Tokenizer
from deploy.demo_model import train_tokenizer

REFERENCE = train_tokenizer()
TOKENIZER = Tokenizer(train_tokenizer())
NUM_TOKENS = 1000
SPECIAL = (0, 1, 2)

TEXTS = st.lists(
    st.sampled_from(
        [*"ab .,\n", "é", "e\u0301", "ñ", "河", "日本", "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "\ufffd", "the ", "ÿ"]
    )
    | st.text(max_size=3),
    max_size=20,
).map("".join)
ANY_TOKENS = st.lists(st.integers(0, NUM_TOKENS + 5) | st.sampled_from(SPECIAL), max_size=80)


def single_byte_tokens() -> dict[int, int]:
    """The token of each byte value."""
    backend = train_tokenizer().backend_tokenizer
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {byte: backend.token_to_id(letter) for byte, letter in letters.items()}


BYTES = single_byte_tokens()


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A text and tokens of it: pieces of its bytes, cut anywhere, each by the tokenizer or byte by byte."""
    text = draw(TEXTS)
    data = text.encode(errors="replace")
    text = data.decode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    tokens: list[int] = []
    for lo, hi in itertools.pairwise([0, *cuts, len(data)]):
        piece = data[lo:hi]
        try:
            whole = piece.decode()
        except UnicodeDecodeError:
            tokens += [BYTES[byte] for byte in piece]
        else:
            tokens += TOKENIZER.encode(whole) if draw(st.booleans()) else [BYTES[byte] for byte in piece]
    return text, tokens


@given(split_texts())
@settings(max_examples=300, deadline=None)
def test_a_text_comes_back_whole_and_never_shows_half_a_character(case: tuple[str, list[int]]):
    text, tokens = case
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
    shown = ""
    for token_id in tokens:
        shown += detokenizer.push(token_id)
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


@given(ANY_TOKENS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_become_what_whole_decoding_makes_of_them(tokens: list[int], skip: bool):
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=skip)
    shown = ""
    for count, token_id in enumerate(tokens, start=1):
        shown += detokenizer.push(token_id)
        assert shown + detokenizer.unfinished == TOKENIZER.decode(tokens[:count], skip_special_tokens=skip)
    assert TOKENIZER.decode(tokens, skip_special_tokens=skip) == shown + detokenizer.finish()


@given(st.lists(st.sampled_from([0x41, 0x80, 0x82, 0xAC, 0xC3, 0xE2, 0xF0, 0x9F, 0x99, 0xFF]), max_size=150))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_characters(data: list[int]):
    tokens = [BYTES[byte] for byte in data]
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
    shown = ""
    for count, token_id in enumerate(tokens, start=1):
        shown += detokenizer.push(token_id)
        assert shown + detokenizer.unfinished == bytes(data[:count]).decode(errors="replace")


@pytest.mark.parametrize("pattern", [[0xE2, 0x82], [0xF0, 0x9F, 0x99], [0x80, 0xF0, 0x9F], [0xC3, 0xC3, 0xE2]])
@pytest.mark.parametrize("num_before", range(4))
def test_a_window_moves_on_between_characters_alone(pattern: list[int], num_before: int):
    data = bytes([0x80] * num_before + pattern * 40 + [0x41])
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
    assert "".join(detokenizer.push(BYTES[byte]) for byte in data) == data.decode(errors="replace")


def test_an_unfinished_character_shows_in_the_end_only():
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
    euro = [BYTES[byte] for byte in "€".encode()]
    assert [detokenizer.push(token_id) for token_id in euro] == ["", "", "€"]
    assert [detokenizer.push(token_id) for token_id in euro[:2]] == ["", ""]
    assert detokenizer.unfinished == REPLACEMENT
    # Tokens without text between the parts of a character are none of its parts.
    assert [detokenizer.push(token_id) for token_id in (*SPECIAL, euro[2])] == ["", "", "", "€"]
    detokenizer.push(euro[0])
    assert detokenizer.finish() == REPLACEMENT


@pytest.mark.parametrize(
    "pattern", [[0x80], [0xE2, 0x82], [0xF0, 0x9F], [0xF0, 0x9F, 0x99], [0x41, 0xC3], [0xEF, 0xBF, 0xBD]]
)
def test_the_work_for_a_token_does_not_grow(pattern: list[int]):
    """No decoding may reach further back than a fixed number of tokens, also where nothing ever becomes certain."""
    longest = 0

    class Counting(Tokenizer):
        def decode(self, token_ids, *, skip_special_tokens):  # type: ignore[no-untyped-def]
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    detokenizer = Detokenizer(Counting(train_tokenizer()), skip_special_tokens=True)
    for count in range(2000):
        detokenizer.push(BYTES[pattern[count % len(pattern)]])
        if count % 7 == 0:
            detokenizer.push(SPECIAL[0])
    assert longest <= 24


STOPS = st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """Where the first complete stop string ends and begins, and which it is: by trying everything."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end, end - len(longest), longest
    return None


def longest_beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end are the beginning of a stop string: by trying everything."""
    lengths = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return max(lengths)


@given(st.lists(st.text("ab€", max_size=4), max_size=12), STOPS)
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_found_wherever_the_text_is_cut(pieces: list[str], stops: list[str]):
    search = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += piece
        expected = first_match(text, stops)
        match = search.push(piece)
        if expected is not None:
            assert match is not None
            assert (match.start, match.stop) == expected[1:]
            return
        assert match is None
        assert search.num_held == longest_beginning(text, stops)


@given(split_texts(), st.lists(st.text("ab .€é河", min_size=1, max_size=3), min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_earliest_token_stops_and_nothing_shown_is_taken_back(
    case: tuple[str, list[int]], stops: list[str], no_stop_trim: bool
):
    _, tokens = case
    params = SamplingParams(stop=tuple(stops), no_stop_trim=no_stop_trim)
    output = OutputText(TOKENIZER, params)
    shown, stopped = "", None
    for token_id in tokens:
        stopped = output.push(token_id)
        now = output.visible()
        assert now.startswith(shown)
        shown = now
        if stopped is not None:
            break
    stopped = stopped or output.finish()
    final = output.final(at_stop_token=False)
    assert final.startswith(shown)
    # The oracle: the text after each token, but for a character at its end that the next tokens may complete.
    for count in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:count], skip_special_tokens=True)
        certain = text.rstrip(REPLACEMENT) if count < len(tokens) else text
        expected = first_match(certain, stops)
        if expected is not None:
            assert stopped == (count, expected[2])
            assert final == (text if no_stop_trim else text[: expected[1]])
            return
    assert stopped is None
    assert final == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(
    split_texts(),
    st.lists(st.text("ab .€é河", min_size=1, max_size=3), max_size=3),
    st.booleans(),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_a_text_that_is_resumed_goes_on_as_if_it_had_never_stopped(
    case: tuple[str, list[int]], stops: list[str], no_stop_trim: bool, where: float
):
    """Wherever the seam is: in a character, in a stop string, or in neither."""
    _, tokens = case
    params = SamplingParams(stop=tuple(stops), no_stop_trim=no_stop_trim)
    one, seam = OutputText(TOKENIZER, params), int(where * len(tokens))
    if any(one.push(token_id) is not None for token_id in tokens[:seam]):
        with pytest.raises(RequestError, match="stop string"):
            OutputText(TOKENIZER, params, tokens[:seam])
        return
    other = OutputText(TOKENIZER, params, tokens[:seam])
    assert other.visible() == one.visible()
    for token_id in tokens[seam:]:
        ours, theirs = one.push(token_id), other.push(token_id)
        assert other.visible() == one.visible()
        if ours is not None:
            assert theirs == Stop(ours.num_tokens - seam, ours.matched)
            break
    if seam < len(tokens):
        ours, theirs = one.finish(), other.finish()
        assert (ours is None) == (theirs is None)
        assert other.final(at_stop_token=False) == one.final(at_stop_token=False)


def test_resumed_tokens_alone_never_stop_a_sample():
    """What is held back of them has been answered before, or will be part of another character."""
    half = [BYTES[byte] for byte in "€".encode()[:1]]
    output = OutputText(TOKENIZER, SamplingParams(stop=(REPLACEMENT,)), half)
    assert output.finish() is None


def test_a_stop_token_is_never_shown():
    word = TOKENIZER.encode("a")[0]
    for params, stop_token in (
        (SamplingParams(stop_token_ids=(word,)), word),
        (SamplingParams(skip_special_tokens=False), SPECIAL[2]),
    ):
        output = OutputText(TOKENIZER, params)
        half = BYTES["€".encode()[0]]
        for token_id in [*TOKENIZER.encode("b. "), half]:
            output.push(token_id)
        assert output.visible() == "b. "
        output.push(stop_token)
        assert output.visible() == "b. "
        assert output.finish() is None
        assert output.final(at_stop_token=True) == "b. " + REPLACEMENT
        assert output.final(at_stop_token=False) == f"b. {REPLACEMENT}{TOKENIZER.text_of(stop_token)}"


def test_a_stop_token_stays_if_it_is_asked_for():
    params = SamplingParams(skip_special_tokens=False, no_stop_trim=True)
    output = OutputText(TOKENIZER, params)
    output.push(SPECIAL[2])
    assert output.visible() == output.final(at_stop_token=True) == "<|im_end|>"


@given(st.lists(st.sampled_from(["a", " b", "<|im_end|>", "河", "é", "\n\n", "<|im_"]), max_size=300).map("".join))
@settings(max_examples=100, deadline=None)
def test_texts_are_tokenised_as_transformers_does(text: str):
    reference = REFERENCE(text).input_ids
    assert TOKENIZER.encode(text) == reference
    for skip in (False, True):
        assert TOKENIZER.decode(reference, skip_special_tokens=skip) == REFERENCE.decode(
            reference, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_a_chat_is_rendered_up_to_the_answer():
    rendered = TOKENIZER.decode(
        TOKENIZER.encode_chat([{"role": "user", "content": "hi"}], {"unused": 1}), skip_special_tokens=False
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [("chat_template_kwargs", {"chat_template": "x"}), ("chat_template_kwargs", {"tokenize": True})],
)
def test_template_arguments_are_the_templates_alone(field: str, kwargs: dict[str, object]):
    with pytest.raises(ValueError, match=field):
        TOKENIZER.encode_chat([{"role": "user", "content": "hi"}], kwargs)


def test_a_template_that_refuses_is_the_clients_mistake():
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="no such role"):
        Tokenizer(tokenizer).encode_chat([{"role": "x", "content": "hi"}], {})
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tokenizer).encode_chat([{"role": "x", "content": "hi"}], {})
