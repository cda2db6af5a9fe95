"""From the launcher's command line to the exact commands of its children; decides everything, starts nothing.

Every child's flags are parsed here once with its own config, so that a mistake is one line before anything has been
started. It knows the roles only as a module name and a config type, and no process.

Neighbours: `deploy.launch_options` (whose flag is whose), `deploy.gpus` (what there is to deal out), `deploy.stack`
(runs the plan).
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct

from common.config import EngineOptions, parse_config
from common.errors import UsageError
from common.process import free_port_runs
from common.ranks import Ranks
from deploy.gpus import visible_gpus
from deploy.launch_options import WORKER_HOST, LaunchConfig, LaunchOptions, Role, RoleName, Roles, deal_options

DEFAULT_STOP_DEADLINE_S = 10.0
STOP_MARGIN_S = 5.0
"""A child gets its own shutdown deadline and this much more before it is killed."""


class Command(Struct, frozen=True, kw_only=True):
    """One child. `name` is unique in the plan; `url` is where it will answer, `addresses` is all that it listens on."""

    name: str
    role: RoleName
    module: str
    arguments: list[str]
    environment: dict[str, str]
    url: str
    addresses: list[tuple[str, int]]
    stop_deadline_s: float


class LaunchPlan(Struct, frozen=True, kw_only=True):
    """All children in the order of their start, and where the stack will answer. `notes` is for the log."""

    commands: list[Command]
    launch: LaunchOptions
    url: str
    api_key: str
    """What the router asks its clients for; empty if nothing."""
    notes: list[str]


def plan_launch(
    argv: list[str],
    roles: Roles,
    *,
    find_gpus: Callable[[], list[str]] = visible_gpus,
    choose_ports: Callable[[Sequence[int]], list[int]] = free_port_runs,
) -> LaunchPlan:
    """Decide what to start. Raises UsageError for an option, a checkpoint or a number of GPUs that cannot be used.

    `choose_ports` gives the first ports of runs of so many consecutive ones.
    """
    own, _ = deal_options(argv, roles)
    launch = parse_config(
        LaunchConfig,
        own,
        prog="python -m deploy.up",
        description="Starts prefill workers, decode workers and the router on this machine, or one aggregated worker and"
        " the router. Any of their options may be given too: --page-size 16 for all that have it, --prefill.page-size 16"
        " for one role.",
    ).launch
    _check_model(launch.model)
    workers = _workers_of(launch, own)
    # Only now is it known who is started; an option that none of them has is a mistake.
    roles = {name: role for name, role in roles.items() if name in (*workers, "router")}
    _, passed = deal_options(argv, roles)

    names = [f"{role}-{index - workers.index(role)}" for index, role in enumerate(workers)]
    to_all = [f"--model={launch.model}", f"--device={launch.device}", f"--host={WORKER_HOST}"]
    ranks = [_ranks_of(name, roles[role], to_all + passed[role]) for name, role in zip(names, workers, strict=True)]
    placements, notes = _place(launch, ranks, find_gpus)
    # Each group of a prefill worker listens for decode workers: the first at the bootstrap port, the others behind it.
    num_groups = [each.dp for role, each in zip(workers, ranks, strict=True) if role == "prefill"]
    ports = choose_ports([1] * len(workers) + num_groups)
    http_ports, bootstrap_ports = ports[: len(workers)], ports[len(workers) :]

    commands: list[Command] = []
    to_router = [f"--host={launch.host}", f"--port={launch.port}"]
    for index, role in enumerate(workers):
        url = f"http://{WORKER_HOST}:{http_ports[index]}"
        flags = [*to_all, f"--port={http_ports[index]}"]
        addresses = [(WORKER_HOST, http_ports[index])]
        if role == "prefill":
            flags.append(f"--bootstrap-port={bootstrap_ports[index]}")
            addresses += [(WORKER_HOST, bootstrap_ports[index] + group) for group in range(ranks[index].dp)]
            to_router += ["--prefill", url, str(bootstrap_ports[index])]
        else:
            to_router += ["--decode" if role == "decode" else "--worker", url]
        commands.append(
            _command(names[index], role, roles[role], flags + passed[role], url, addresses, placements[index])
        )
    worker_key = _value_of(_parsed(commands[0].name, roles[workers[0]], commands[0].arguments), "api_key")
    if worker_key:
        to_router.append(f"--worker-api-key={worker_key}")
    url = f"http://{_as_url_host(WORKER_HOST if launch.host in ('0.0.0.0', '::') else launch.host)}:{launch.port}"
    addresses = [(launch.host, launch.port)]
    router = _command("router", "router", roles["router"], to_router + passed["router"], url, addresses, _ANYWHERE)
    commands.append(router)
    return LaunchPlan(
        api_key=str(_value_of(_parsed("router", roles["router"], router.arguments), "api_key") or ""),
        commands=commands,
        launch=launch,
        url=url,
        notes=notes,
    )


def _workers_of(launch: LaunchOptions, own: list[str]) -> list[RoleName]:
    """Name the role of each worker that is to start, those of one role together. Raises UsageError for a contradiction."""
    if not launch.aggregated:
        return [*["prefill"] * launch.prefill, *["decode"] * launch.decode]  # type: ignore[list-item]
    flags = {word.partition("=")[0] for word in own}
    defaults = {field.name: field.default for field in msgspec.structs.fields(LaunchOptions)}
    for name, count in (("prefill", launch.prefill), ("decode", launch.decode)):
        if f"--{name}" in flags or count != defaults[name]:
            raise UsageError(f"--{name}: with --aggregated there is one worker, and no {name} worker")
    return ["aggregated"]


def _ranks_of(name: str, role: Role, flags: list[str]) -> Ranks:
    """The ranks of a worker with these options. Raises UsageError, which names the worker."""
    config = _parsed(name, role, flags)
    options = EngineOptions()
    for group in msgspec.structs.fields(config):
        if isinstance(found := getattr(config, group.name), EngineOptions):
            options = found
    try:
        return options.ranks
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def _value_of(config: Struct, name: str) -> object:
    """The value of an option of whichever group has it, None if none has."""
    for group in msgspec.structs.fields(config):
        values = msgspec.structs.asdict(getattr(config, group.name))
        if name in values:
            return values[name]
    return None


def _as_url_host(host: str) -> str:
    """Write a host as URLs have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _check_model(model: str) -> None:
    path = Path(model).expanduser()
    # Anything else may be a hub id, which only the workers can look up.
    is_path = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.exists()
    if is_path and not (path / "config.json").is_file():
        raise UsageError(f"--model {model}: no checkpoint there (config.json is missing)")


# ------------------------------------------------------------------------------------------------ placement


class _Placement(Struct, frozen=True):
    """Where a child runs: its GPUs, of its ranks in order, or none in particular; and how many children share them."""

    gpus: tuple[str, ...] = ()
    sharers: int = 1


_ANYWHERE = _Placement()


def _place(
    launch: LaunchOptions, ranks: list[Ranks], find_gpus: Callable[[], list[str]]
) -> tuple[list[_Placement], list[str]]:
    """Give each rank of each worker a GPU of its own, or let a pair share them all: a rank of each on every GPU."""
    gpus = [] if launch.device == "cpu" else find_gpus()
    if not gpus and launch.device != "cuda":
        return [_ANYWHERE] * len(ranks), []
    num_needed = sum(each.tp for each in ranks)
    if len(gpus) >= num_needed:
        left = iter(gpus)
        return [_Placement(tuple(islice(left, each.tp))) for each in ranks], []
    if gpus and [each.tp for each in ranks] == [len(gpus)] * 2:
        note = f"the two workers share GPU {', '.join(gpus)}, each with half of the memory fraction"
        return [_Placement(tuple(gpus), sharers=2)] * 2, [note]
    needed = " + ".join(str(each.tp) for each in ranks)
    raise UsageError(
        f"--device {launch.device}: {len(ranks)} workers with {needed} ranks need {num_needed} GPUs, "
        f"this machine has {len(gpus)}"
    )


def _command(
    name: str,
    role_name: RoleName,
    role: Role,
    flags: list[str],
    url: str,
    addresses: list[tuple[str, int]],
    placement: _Placement,
) -> Command:
    config = _parsed(name, role, flags)
    fraction = _value_of(config, "memory_fraction")
    if placement.sharers > 1 and isinstance(fraction, float):
        asked_for = any(flag.partition("=")[0] == "--memory-fraction" for flag in flags)
        # Who names a fraction has done this division already.
        flags = flags if asked_for else [*flags, f"--memory-fraction={fraction / placement.sharers}"]
    stop_deadline_s = _value_of(config, "shutdown_deadline_s")
    return Command(
        name=name,
        role=role_name,
        module=role.module,
        arguments=flags,
        environment={"CUDA_VISIBLE_DEVICES": ",".join(placement.gpus)} if placement.gpus else {},
        url=url,
        addresses=addresses,
        stop_deadline_s=STOP_MARGIN_S
        + (stop_deadline_s if isinstance(stop_deadline_s, float) else DEFAULT_STOP_DEADLINE_S),
    )


def _parsed(name: str, role: Role, flags: list[str]) -> Struct:
    try:
        return parse_config(role.config_type, flags, prog=f"python -m {role.module}", description="")
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
