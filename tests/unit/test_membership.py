"""Who is a worker of the router: joining, renewing, leases and leaving, and who may be picked meanwhile."""

from contextlib import ExitStack
from typing import Any

import pytest

from common.errors import NoHealthyPair, RequestError
from common.messages import ReportedError, WorkerKind
from router.config import RouterOptions
from router.leg_run import leg_on
from router.membership import Membership
from router.worker import Worker
from tests.support.prompts import sample

A, B = "http://a:1", "http://b:1"


def membership(**options: Any) -> Membership:
    return Membership(RouterOptions(**options))


def join(members: Membership, url: str = A, role: WorkerKind = "decode", **place: Any) -> Worker:
    worker, is_new = members.join(url, role, **place)
    assert is_new
    return worker


def test_a_router_without_workers_says_so_until_they_have_joined():
    members = membership()
    assert members.workers == []
    with pytest.raises(NoHealthyPair, match="there is no prefill worker"):
        members.pick("prefill", sample())
    decode, prefill = join(members), join(members, B + "/", "prefill", bootstrap_port=9)
    assert members.workers == [prefill, decode]
    assert (prefill.url, prefill.bootstrap_port) == (B, 9)
    assert (members.pick("prefill", sample()), members.pick("decode", sample())) == (prefill, decode)


def test_workers_are_found_by_id_and_by_url():
    members = membership(prefill=((A + "/", 1),), decode=(B,))
    for worker in members.workers:
        assert members.find(worker.id) is members.find(worker.url) is members.find(worker.url + "/") is worker
    assert members.find("http://c:1") is None
    assert len({worker.id for worker in members.workers}) == 2


def test_who_joins_again_keeps_all_that_is_known_of_it():
    members = membership(breaker_failures=1)
    worker = join(members)
    worker.mark_unhealthy("it is stuck", ends_legs=False)
    with leg_on(worker) as leg:
        leg.failed()
        again, is_new = members.join(A + "/", "decode", lease_s=5.0)
        assert (again, is_new) == (worker, False)
        assert (worker.outstanding, worker.lease_s) == (1, 5.0)
        assert worker.unhealthy_reason is not None
        assert not worker.breaker.lets_through
    assert members.workers == [worker]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_another_role_or_port_is_another_worker_and_the_one_before_drains(role: WorkerKind):
    members = membership()
    before = join(members, role="prefill", bootstrap_port=1)
    with leg_on(before):
        after = join(members, role=role, bootstrap_port=2 if role == "prefill" else None)
        assert (before.is_draining, before.gone.is_set(), after.is_draining) == (True, False, False)
        assert set(members.workers) == {before, after}
        assert members.find(A) is after
        assert members.pick(role, sample()) is after
    assert before.gone.is_set()
    assert members.workers == [after]


@pytest.mark.parametrize(("there", "comes"), [("decode", "aggregated"), ("aggregated", "decode")])
def test_pairs_and_aggregated_workers_do_not_mix(there: WorkerKind, comes: WorkerKind):
    members = membership()
    first = join(members, role=there)
    with pytest.raises(RequestError, match=f"worker_type: is {comes}, but there are {there} workers"):
        members.join(B, comes)
    assert members.has_pairs is (there == "decode")
    # The last of its kind may come back as another kind, and who drains is in nobody's way.
    second = join(members, role=comes)
    assert members.workers == [second]
    with leg_on(second):
        members.leave(second, "test")
        join(members, B, there)
        assert members.has_pairs is (there == "decode")
    assert first.gone.is_set()
    assert second.gone.is_set()


# ------------------------------------------------------------------------------------------------ leaving


def test_who_leaves_is_picked_no_more_and_gone_after_its_last_leg():
    members = membership(decode=(A, B))
    leaving, other = members.workers
    with ExitStack() as late, leg_on(leaving):
        late.enter_context(leg_on(leaving))
        members.leave(leaving, "test")
        assert {members.pick("decode", sample(), failed=[other]) for _ in range(10)} == {other}
        assert leaving.obstacle == "it is being removed"
        late.close()
        assert not leaving.gone.is_set()
    assert leaving.gone.is_set()
    assert members.workers == [other]
    assert members.find(A) is None


def test_who_has_nothing_to_do_is_gone_at_once():
    members = membership(decode=(A,))
    (worker,) = members.workers
    members.changed.clear()
    members.leave(worker, "test")
    assert worker.gone.is_set()
    assert members.changed.is_set()
    members.leave(worker, "again")
    assert members.workers == []


def test_a_leg_that_was_picked_before_its_worker_was_gone_runs_to_its_end():
    members = membership(decode=(A,))
    worker = members.pick("decode", sample())
    members.leave(worker, "test")
    assert worker.gone.is_set()
    with leg_on(worker, 5) as leg:
        assert worker.outstanding_tokens == 5
        leg.succeeded()
    assert (worker.outstanding, worker.outstanding_tokens) == (0, 0)


def test_who_joins_while_it_drains_stays():
    members = membership(decode=(A,))
    (worker,) = members.workers
    with leg_on(worker):
        members.leave(worker, "test")
        assert members.join(A, "decode") == (worker, False)
    assert members.workers == [worker]
    assert not worker.gone.is_set()
    assert members.pick("decode", sample()) is worker
    members.leave(worker, "test")
    assert join(members) is not worker, "who is gone comes as somebody new"


def test_a_process_that_was_removed_does_not_come_back_by_itself():
    members = membership()
    worker = join(members, lease_s=9.0, instance="one")
    with leg_on(worker):
        members.remove(worker)
        with pytest.raises(ReportedError, match="was removed") as refused:
            members.join(A, "decode", lease_s=9.0, instance="one")
        assert refused.value.report.status == 410
        assert worker.is_draining
    assert members.workers == []
    with pytest.raises(ReportedError):
        members.join(A, "decode", instance="one")
    again = join(members, instance="two")
    members.leave(again, "its lease was over")
    join(members, instance="two")


def test_somebody_else_may_bring_a_removed_worker_back():
    members = membership()
    members.remove(join(members, instance="one"))
    worker = join(members)
    members.remove(worker)
    assert join(members) is not worker


# ------------------------------------------------------------------------------------------------ leases


def test_a_worker_whose_lease_passes_drains_away_and_the_others_stay():
    members = membership(decode=(B,))
    worker = join(members, lease_s=3.0)
    for _ in range(3):
        members.pass_time(1.0)
    assert not worker.is_draining, "it may have joined just before the first of these seconds was over"
    with leg_on(worker):
        members.pass_time(1.0)
        assert (worker.is_draining, worker.gone.is_set()) == (True, False)
        members.pass_time(1.0)
    assert worker.gone.is_set()
    assert [left.url for left in members.workers] == [B]
    members.pass_time(1e9)
    assert [left.url for left in members.workers] == [B]


def test_a_renewed_lease_begins_anew_and_the_last_one_counts():
    members = membership()
    worker = join(members, lease_s=3.0)
    for _ in range(10):
        members.pass_time(2.5)
        assert members.join(A, "decode", lease_s=3.0) == (worker, False)
    members.join(A, "decode", lease_s=None)
    members.pass_time(1e9)
    members.pass_time(1e9)
    assert members.workers == [worker]


def test_a_lease_shorter_than_the_pauses_between_two_looks_is_kept_over_one():
    members = membership()
    worker = join(members, lease_s=0.1)
    members.pass_time(1.0)
    members.join(A, "decode", lease_s=0.1)
    members.pass_time(1.0)
    assert not worker.is_draining
    members.pass_time(1.0)
    assert worker.gone.is_set()


def test_a_lease_that_passed_can_be_renewed_while_there_are_legs():
    members = membership()
    worker = join(members, lease_s=1.0)
    with leg_on(worker):
        members.pass_time(1.0)
        members.pass_time(1.0)
        assert worker.is_draining
        members.join(A, "decode", lease_s=1.0)
        members.pass_time(1.0)
    assert members.workers == [worker]


# ------------------------------------------------------------------------------------------------ weight versions


def test_workers_of_the_same_weights_come_first_even_if_they_have_failed():
    members = membership(decode=(A, B, "http://c:1"), policy="random")
    a, b, c = members.workers
    for worker, version in ((a, "v1"), (b, "v2"), (c, "v2")):
        worker.mark_healthy(1, weight_version=version)
    pick = members.pick
    assert {pick("decode", sample(), version="v2") for _ in range(50)} == {b, c}
    assert {pick("decode", sample(), version="v2", failed=[b]) for _ in range(20)} == {c}
    assert {pick("decode", sample(), version="v1", failed=[a]) for _ in range(20)} == {a}
    assert {pick("decode", sample(), version="v3") for _ in range(99)} == {a, b, c}
    assert {pick("decode", sample(), version=None) for _ in range(99)} == {a, b, c}
    a.mark_unhealthy("it is stuck", ends_legs=False)
    assert {pick("decode", sample(), version="v1") for _ in range(50)} == {b, c}


def test_tokens_are_counted_as_long_as_their_legs_last():
    (worker,) = membership(decode=(A,)).workers
    with leg_on(worker, 10):
        with leg_on(worker, 7):
            assert worker.outstanding_tokens == 17
        assert worker.outstanding_tokens == 10
    assert worker.outstanding_tokens == 0
