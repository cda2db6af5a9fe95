"""The state table of a request: every move there is, legal or refused."""

import itertools

import pytest
from msgspec.structs import replace

from common.scheduling.request import Request, RequestState
from tests.support.schedulers import make_request

LEGAL = {
    # Both roles.
    ("QUEUED", "ENDED"),
    ("QUEUED", "RUNNING"),
    ("RUNNING", "COLLECTING"),
    ("RUNNING", "SURPLUS"),
    ("RUNNING", "ENDED"),
    ("COLLECTING", "SURPLUS"),
    ("COLLECTING", "ENDED"),
    ("SURPLUS", "ENDED"),
    # Prefill: the pages wait for their transfer.
    ("RUNNING", "LEASED"),
    ("COLLECTING", "LEASED"),
    ("SURPLUS", "LEASED"),
    ("LEASED", "ENDED"),
    # Decode: pages that a peer writes into, and pages given up for a while.
    ("QUEUED", "RECEIVING"),
    ("RECEIVING", "RUNNING"),
    ("RECEIVING", "ENDED"),
    ("RECEIVING", "QUARANTINED"),
    ("QUARANTINED", "ENDED"),
    ("RUNNING", "SWAPPED"),
    ("SWAPPED", "RUNNING"),
    ("SWAPPED", "ENDED"),
    # Both on one engine: the pages wait for the prompt's own steps, and a prompt may want no token.
    ("RECEIVING", "COLLECTING"),
    ("RECEIVING", "SURPLUS"),
}


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(RequestState, RequestState)), ids=lambda s: s.name
)
def test_moves(source: RequestState, target: RequestState):
    request = make_request([1, 2], rid="r7")
    request.state = source
    if (source.name, target.name) in LEGAL:
        request.advance(target)
        assert request.state is target
    else:
        with pytest.raises(AssertionError, match=f"r7: {source.name} -> {target.name} is not a legal move"):
            request.advance(target)
        assert request.state is source


def test_only_the_end_is_terminal():
    leavable = {source for source, _ in LEGAL}
    assert {state.name for state in RequestState} - leavable == {"ENDED"}


def test_tokens_and_lengths():
    request = make_request([7, 8, 9], max_new_tokens=4)
    request.output_ids += [5, 6]
    assert [request.token_at(position) for position in range(request.num_known_tokens)] == [7, 8, 9, 5, 6]
    assert (request.num_prompt_tokens, request.num_known_tokens, request.max_total_tokens) == (3, 5, 7)
    with pytest.raises(IndexError):
        request.token_at(5)


def test_requests_are_compared_by_identity():
    """Two samples of equal content are two requests, in sets too."""
    assert make_request([1]) != make_request([1])
    assert len({make_request([1]), make_request([1])}) == 2


def test_each_sample_has_a_seed_of_its_own():
    """Seed + index, and still a seed at the upper end."""
    request = make_request([1], n=3, index=2)
    assert request.seed == 2
    message = request.message
    sampling = replace(message.options.sampling, seed=2**63 - 1)
    last = replace(message, options=replace(message.options, sampling=sampling))
    assert [Request.of(last, index).seed for index in range(3)] == [2**63 - 1, 0, 1]
