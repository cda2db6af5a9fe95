"""The launcher's command line: its own options, and any option of a role, dealt out to whom it belongs.

`--page-size 16` goes to every role that has that option, `--prefill.page-size 16` to the prefill workers alone. What an
option means, and whether its value can be used, is not known here: each role's own config says that.

Neighbours: `deploy.launch_plan` makes commands of what comes out, `deploy.roles` names the roles.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Struct

from common.config import option
from common.errors import UsageError

RoleName = Literal["prefill", "decode", "aggregated", "router"]

WORKER_HOST = "127.0.0.1"

# The launcher wires its children together; an address given to one child would leave the others with a wrong one.
RESERVED = frozenset({"host", "port", "bootstrap_host", "bootstrap_port", "prefill", "decode", "worker"})


class LaunchOptions(Struct, frozen=True, kw_only=True):
    """Which stack to start on this machine."""

    model: Annotated[str, option("checkpoint folder, or a Hugging Face hub id", metavar="PATH_OR_ID")]
    prefill: Annotated[int, option("number of prefill workers", unit="workers", ge=1, le=64)] = 1
    decode: Annotated[int, option("number of decode workers", unit="workers", ge=1, le=64)] = 1
    aggregated: Annotated[
        bool, option("start one worker that computes prompts and generates, in the place of prefill and decode workers")
    ] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], option("where the model runs; auto: GPUs if any")] = "auto"
    host: Annotated[str, option("address of the router; the workers listen on this machine only")] = WORKER_HOST
    port: Annotated[int, option("port that the router listens on", ge=1, le=65535)] = 8000
    startup_deadline_s: Annotated[
        float, option("longest time until the first answer, of the stack or of a restarted child", unit="s", gt=0)
    ] = 900.0
    restart: Annotated[bool, option("start a child again when it has ended by itself, or was killed as unhealthy")] = (
        False
    )
    max_restarts: Annotated[
        int, option("with --restart: more ends of one child within a minute of its running end the stack", ge=0)
    ] = 10
    fence_deadline_s: Annotated[
        float, option("a child that has not answered /health with 200 for so long is killed", unit="s", gt=0)
    ] = 60.0


class LaunchConfig(Struct, frozen=True):
    """The launcher's config."""

    launch: LaunchOptions


class Role(Struct, frozen=True):
    """A kind of child: `python -m module`, with the flags of `config_type`."""

    module: str
    config_type: type[Struct]


Roles = Mapping[RoleName, Role]


def deal_options(argv: list[str], roles: Roles) -> tuple[list[str], dict[RoleName, list[str]]]:
    """Split the command line into the launcher's own flags and those of each role, in their order."""
    own: list[str] = []
    passed: dict[RoleName, list[str]] = {role: [] for role in roles}
    own_names = {field.name for field in msgspec.structs.fields(LaunchOptions)} | {"help", "config"}
    for words in _grouped(argv):
        flag, equals, value = words[0].partition("=")
        prefix, dot, rest = flag.removeprefix("--").partition(".")
        name = prefix.replace("-", "_")
        if dot:
            role = next((role for role in roles if role == prefix), None)
            if role is None or not rest:
                raise UsageError(f"unknown option {flag}: the roles are {', '.join(roles)}")
            _refuse_address(flag, rest)
            passed[role] += [f"--{rest}{equals}{value}", *words[1:]]
        elif flag == "-h" or name in own_names or name.removeprefix("no_") in own_names:
            own += words
        else:
            _refuse_address(flag, prefix)
            takers = [role for role in roles if _has_option(roles[role].config_type, prefix)]
            if not takers:
                raise UsageError(f"unknown option {flag}: neither the launcher nor {', '.join(roles)} has it")
            for role in takers:
                passed[role] += words
    return own, passed


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command's own flags, and those of `deploy.up` that follow behind `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _grouped(argv: list[str]) -> list[list[str]]:
    """Each flag with the words that follow it, up to the next flag."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or word == "-h":
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise UsageError(f"unexpected argument {word!r}: every value follows its option")
    return groups


def _refuse_address(flag: str, name: str) -> None:
    if name.replace("-", "_") in RESERVED:
        raise UsageError(f"{flag}: the launcher chooses its children's addresses")


def _has_option(config_type: type[Struct], flag: str) -> bool:
    name = flag.replace("-", "_")
    groups = [group.type for group in msgspec.structs.fields(config_type)]
    names = {field.name for group in groups for field in msgspec.structs.fields(group)}
    return name in names or name.removeprefix("no_") in names
