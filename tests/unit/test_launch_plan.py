"""What the launcher would start, for each kind of command line and machine; nothing is started here."""

from pathlib import Path

import pytest

from common.errors import UsageError
from deploy.launch_plan import Command, LaunchPlan, plan_launch
from tests.support.stub_stack import stub_roles


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return f"--model={tmp_path}"


def plan(*flags: str, gpus: tuple[str, ...] = ()) -> LaunchPlan:
    return plan_launch(
        list(flags),
        stub_roles(),
        find_gpus=lambda: list(gpus),
        choose_ports=lambda lengths: [9000 + sum(lengths[:index]) for index in range(len(lengths))],
    )


def commands(plan: LaunchPlan) -> dict[str, Command]:
    return {command.name: command for command in plan.commands}


def test_the_children_know_each_others_addresses(model: str) -> None:
    stack = commands(plan(model, "--prefill=2", "--decode=1", "--port=8123"))
    assert list(stack) == ["prefill-0", "prefill-1", "decode-0", "router"]
    assert "--port=9001" in stack["prefill-1"].arguments
    assert "--bootstrap-port=9004" in stack["prefill-1"].arguments
    assert stack["router"].arguments == [
        *("--host=127.0.0.1", "--port=8123"),
        *("--prefill", "http://127.0.0.1:9000", "9003"),
        *("--prefill", "http://127.0.0.1:9001", "9004"),
        *("--decode", "http://127.0.0.1:9002"),
    ]


def test_every_address_that_a_child_listens_on_is_known(model: str) -> None:
    """So that it is started again only once they are free."""
    stack = commands(plan(model, "--port=8123", "--host=0.0.0.0"))
    assert stack["prefill-0"].addresses == [("127.0.0.1", 9000), ("127.0.0.1", 9002)]
    assert stack["decode-0"].addresses == [("127.0.0.1", 9001)]
    assert stack["router"].addresses == [("0.0.0.0", 8123)]


def test_how_a_stack_is_watched(model: str) -> None:
    launch = plan(model).launch
    assert (launch.restart, launch.max_restarts, launch.fence_deadline_s) == (False, 10, 60.0)
    launch = plan(model, "--restart", "--max-restarts=0", "--fence-deadline-s=2.5").launch
    assert (launch.restart, launch.max_restarts, launch.fence_deadline_s) == (True, 0, 2.5)


def test_a_plain_option_goes_to_all_that_have_it(model: str) -> None:
    stack = commands(
        plan(
            model,
            "--page-size",
            "8",
            "--no-overlap",
            "--log-level=debug",
            "--policy",
            "random",
            "--chunked-prefill-tokens=32",
        )
    )
    for name, mine, others in (
        (
            "prefill-0",
            ["--page-size", "8", "--no-overlap", "--log-level=debug", "--chunked-prefill-tokens=32"],
            "policy",
        ),
        ("decode-0", ["--page-size", "8", "--no-overlap", "--log-level=debug"], "chunked"),
        ("router", ["--log-level=debug", "--policy", "random"], "page-size"),
    ):
        assert stack[name].arguments[-len(mine) :] == mine
        assert others not in " ".join(stack[name].arguments)


def test_a_prefixed_option_goes_to_one_role(model: str) -> None:
    stack = commands(plan(model, "--decode.page-size", "8", "--prefill.page-size=4", "--prefill.no-overlap"))
    assert stack["prefill-0"].arguments[-2:] == ["--page-size=4", "--no-overlap"]
    assert stack["decode-0"].arguments[-2:] == ["--page-size", "8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--page-sise=8"], "unknown option --page-sise"),
        (["--worker.page-size=8"], "unknown option --worker.page-size"),
        (["--prefill.policy=random"], "prefill-0: unrecognized arguments"),
        (["--page-size=0"], "prefill-0: --page-size"),
        (["--decode.page-size=x"], "decode-0: --page-size"),
        (["--prefill=0"], "--prefill 0"),
        (["--prefill.port=1"], "--prefill.port: the launcher chooses"),
        (["--bootstrap-port=1"], "--bootstrap-port: the launcher chooses"),
        (["--device=tpu"], "--device"),
        (["--max-restarts=-1"], "--max-restarts"),
        (["--fence-deadline-s=0"], "--fence-deadline-s"),
        (["--config=/nowhere.toml"], "--config /nowhere.toml"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(model, *flags)
    assert message in str(error.value)


def test_an_aggregated_stack_has_one_worker_and_one_gpu(model: str) -> None:
    stack = commands(plan(model, "--aggregated", "--page-size=8", "--policy=random", gpus=("3", "4")))
    assert list(stack) == ["aggregated-0", "router"]
    assert stack["aggregated-0"].environment == {"CUDA_VISIBLE_DEVICES": "3"}
    assert stack["aggregated-0"].arguments[-2:] == ["--port=9000", "--page-size=8"]
    assert stack["router"].arguments == [
        *("--host=127.0.0.1", "--port=8000"),
        *("--worker", "http://127.0.0.1:9000", "--policy=random"),
    ]
    assert list(commands(plan(model, "--no-aggregated"))) == ["prefill-0", "decode-0", "router"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prefill=1"], "--prefill: with --aggregated"),
        (["--decode", "2"], "--decode: with --aggregated"),
        (["--prefill.page-size=4"], "unknown option --prefill.page-size: the roles are aggregated, router"),
        (["--chunked-prefill-tokens=32"], "unknown option --chunked-prefill-tokens"),
        (["--aggregated.page-size=x"], "aggregated-0: --page-size"),
        (["--worker=http://a:1"], "--worker: the launcher chooses"),
        (["--device=cuda"], "1 workers with 1 ranks need 1 GPUs"),
    ],
)
def test_what_does_not_go_with_aggregated_is_named(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(model, "--aggregated", *flags)
    assert message in str(error.value)


def test_the_mode_may_come_from_a_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "up.toml"
    file.write_text("aggregated = true\n")
    assert list(commands(plan(model, f"--config={file}"))) == ["aggregated-0", "router"]
    file.write_text("aggregated = true\ndecode = 2\n")
    with pytest.raises(UsageError, match="--decode: with --aggregated"):
        plan(model, f"--config={file}")


def test_an_option_of_the_aggregated_worker_goes_to_no_pair(model: str) -> None:
    with pytest.raises(
        UsageError, match=r"unknown option --aggregated.page-size: the roles are prefill, decode, router"
    ):
        plan(model, "--aggregated.page-size=4")


def test_words_without_an_option_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match="unexpected argument 'serve'"):
        plan("serve", model)


def test_a_model_is_required_and_a_path_must_hold_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--model"):
        plan()
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        plan(f"--model={tmp_path}")
    assert commands(plan("--model=someone/some-moe"))["decode-0"].arguments[0] == "--model=someone/some-moe"


def test_each_worker_gets_a_gpu_of_its_own(model: str) -> None:
    stack = commands(plan(model, "--prefill=2", gpus=("4", "5", "6", "7")))
    assert [stack[name].environment for name in ("prefill-0", "prefill-1", "decode-0", "router")] == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "6"},
        {},
    ]


def test_a_pair_shares_the_only_gpu_and_says_so(model: str) -> None:
    shared = plan(model, gpus=("0",))
    for name in ("prefill-0", "decode-0"):
        assert commands(shared)[name].environment == {"CUDA_VISIBLE_DEVICES": "0"}
        assert commands(shared)[name].arguments[-1] == "--memory-fraction=0.425"
    assert len(shared.notes) == 1


def test_a_pair_of_as_many_ranks_as_gpus_shares_them_all(model: str) -> None:
    shared = plan(model, "--prefill.tp=2", "--decode.dp=2", gpus=("a", "b"))
    for name in ("prefill-0", "decode-0"):
        assert commands(shared)[name].environment == {"CUDA_VISIBLE_DEVICES": "a,b"}
        assert commands(shared)[name].arguments[-1] == "--memory-fraction=0.425"
    assert len(shared.notes) == 1
    with pytest.raises(UsageError, match=r"2 workers with 2 \+ 1 ranks need 3 GPUs, this machine has 2"):
        plan(model, "--prefill.tp=2", gpus=("a", "b"))


def test_a_memory_fraction_that_was_asked_for_is_kept(model: str) -> None:
    stack = commands(plan(model, "--decode.memory-fraction=0.6", gpus=("0",)))
    assert stack["decode-0"].arguments[-1] == "--memory-fraction=0.6"
    assert stack["prefill-0"].arguments[-1] == "--memory-fraction=0.425"


def test_too_few_gpus_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match=r"2 workers with 1 \+ 1 ranks need 2 GPUs, this machine has 0"):
        plan(model, "--device=cuda")
    with pytest.raises(UsageError, match=r"3 workers with 1 \+ 1 \+ 1 ranks need 3 GPUs, this machine has 2"):
        plan(model, "--decode=2", gpus=("0", "1"))


def test_each_rank_gets_a_gpu_of_its_own(model: str) -> None:
    stack = commands(plan(model, "--prefill.tp=2", "--decode.dp=4", "--decode.ep", gpus=tuple("abcdefg")))
    assert stack["prefill-0"].environment == {"CUDA_VISIBLE_DEVICES": "a,b"}
    assert stack["decode-0"].environment == {"CUDA_VISIBLE_DEVICES": "c,d,e,f"}
    assert stack["decode-0"].arguments[-2:] == ["--dp=4", "--ep"]
    stack = commands(plan(model, "--aggregated", "--tp=2", gpus=("3", "4")))
    assert stack["aggregated-0"].environment == {"CUDA_VISIBLE_DEVICES": "3,4"}


@pytest.mark.parametrize(
    ("flags", "gpus", "message"),
    [
        (["--tp=2"], "abc", r"2 workers with 2 \+ 2 ranks need 4 GPUs, this machine has 3"),
        (["--decode.tp=2"], "a", r"2 workers with 1 \+ 2 ranks need 3 GPUs, this machine has 1"),
        (["--aggregated", "--tp=2"], "a", r"1 workers with 2 ranks need 2 GPUs, this machine has 1"),
        (["--decode.tp=3", "--decode.dp=2"], "abcd", r"decode-0: --dp 2: does not divide --tp 3"),
    ],
)
def test_ranks_that_have_no_gpu_or_make_no_groups(model: str, flags: list[str], gpus: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(model, *flags, gpus=tuple(gpus))


def test_each_group_of_a_prefill_worker_has_a_port(model: str) -> None:
    stack = commands(plan(model, "--prefill=2", "--prefill.dp=3", "--decode.dp=2"))
    # 9000 to 9002 are for HTTP.
    assert "--bootstrap-port=9003" in stack["prefill-0"].arguments
    assert stack["prefill-0"].addresses == [("127.0.0.1", port) for port in (9000, 9003, 9004, 9005)]
    assert "--bootstrap-port=9006" in stack["prefill-1"].arguments
    assert stack["prefill-1"].addresses == [("127.0.0.1", port) for port in (9001, 9006, 9007, 9008)]
    assert stack["decode-0"].addresses == [("127.0.0.1", 9002)]
    assert stack["router"].arguments[2:8] == [
        *("--prefill", "http://127.0.0.1:9000", "9003"),
        *("--prefill", "http://127.0.0.1:9001", "9006"),
    ]


def test_the_cpu_is_used_where_there_is_no_gpu_or_it_is_asked_for(model: str) -> None:
    for stack in (plan(model), plan(model, "--device=cpu", gpus=("0", "1"))):
        assert all(command.environment == {} for command in stack.commands)
