"""Config: one frozen struct a role, one declaration an option; flags, TOML, validation and --help derive from it.

An option is an annotated field: `page_size: Annotated[int, option("slots in a KV page", unit="tokens", ge=1)] = 16`. A role's
config is a struct of option groups (composition, not inheritance), and field names are unique across a role's groups, so that
flags are flat: `--page-size 16`. Values come from the defaults, then a TOML file (`--config`), then the flags.

It knows no role; the roles' own config modules compose the groups below.
"""

import argparse
import math
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from common.errors import UsageError
from common.ranks import Ranks, choose_ranks

Config = TypeVar("Config", bound=Struct)


def option(
    description: str,
    *,
    unit: str | None = None,
    metavar: str | tuple[str, ...] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Meta:
    """Declare an option: what it does, its unit and its bounds."""
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le)) if bound is not None}
    return Meta(description=description, extra={"unit": unit, "metavar": metavar}, **bounds)  # type: ignore[call-overload, no-any-return]


# ------------------------------------------------------------------------------------------------ option groups


class ModelOptions(Struct, frozen=True, kw_only=True):
    """Which model, and in which form."""

    model: Annotated[str, option("checkpoint folder, or a Hugging Face hub id", metavar="PATH_OR_ID")]
    load_format: Annotated[
        Literal["auto", "dummy"], option("auto: read the weights; dummy: random weights of the config's shapes")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        option("type of weights and activations; auto: the checkpoint's"),
    ] = "auto"
    context_tokens: Annotated[
        int, option("longest prompt plus output; 0: what the model was trained for", unit="tokens", ge=0)
    ] = 0
    weight_version: Annotated[str, option("name of these weights, reported with every reply")] = "default"


class EngineOptions(Struct, frozen=True, kw_only=True):
    """How one engine process runs."""

    device: Annotated[Literal["auto", "cpu", "cuda"], option("where the model runs; auto: a GPU if there is one")] = (
        "auto"
    )
    tp: Annotated[
        int, option("ranks of the worker, each with a GPU of its own; 0: as many as --dp", unit="ranks", ge=0, le=64)
    ] = 0
    dp: Annotated[
        int,
        option(
            "attention groups that the ranks form, each with requests and KV of its own", unit="groups", ge=1, le=64
        ),
    ] = 1
    ep: Annotated[bool, option("split the experts over the ranks as wholes, not each one's width")] = False
    page_size: Annotated[int, option("slots in one KV page", unit="tokens", ge=1, le=1024)] = 16
    kv_pool_tokens: Annotated[
        int, option("slots in the KV pool; 0: from --memory-fraction on a GPU, 32768 on a CPU", unit="tokens", ge=0)
    ] = 0
    memory_fraction: Annotated[
        float, option("part of the GPU's memory for weights and KV pool together", gt=0, le=1)
    ] = 0.85
    max_running_requests: Annotated[
        int, option("requests that may hold pages and run at a time", unit="requests", ge=1, le=65536)
    ] = 256
    overlap: Annotated[bool, option("prepare step n+1 while step n runs")] = True
    kernels: Annotated[
        Literal["auto", "torch", "fused"],
        option(
            "fused: Triton and flashinfer, for 16-bit types on a GPU; torch: slow, anywhere; auto: fused where it can run"
        ),
    ] = "auto"
    fp8: Annotated[
        Literal["auto", "native", "dequantised"],
        option(
            "experts of an FP8 checkpoint: native: as they are, with fused kernels on Hopper; auto: so where it can be"
        ),
    ] = "auto"
    cuda_graphs: Annotated[bool, option("with fused kernels: run small steps as captured CUDA graphs")] = True
    verify_rows: Annotated[bool, option("check every routed-expert row before it leaves")] = True
    cpu_threads: Annotated[
        int, option("torch threads of an engine on a CPU; 0: half the cores", unit="threads", ge=0)
    ] = 0
    max_quarantine: Annotated[
        float,
        option("part of the KV pool that may be in quarantine before the worker takes no more requests", gt=0, le=1),
    ] = 0.5
    quarantine_patience_s: Annotated[
        float, option("how long more than that may be in quarantine: many aborts at once are no fault", unit="s", gt=0)
    ] = 5.0
    watchdog_s: Annotated[
        float,
        option(
            "a turn of the engine's loop that takes longer is reported, with what every thread does", unit="s", gt=0
        ),
    ] = 30.0
    engine_deadline_s: Annotated[
        float, option("longest silence of an engine before its requests fail; it beats once a second", unit="s", gt=2)
    ] = 30.0
    weights_deadline_s: Annotated[
        float,
        option("longest time that a weight update, or meeting a trainer for it, may take", unit="s", gt=0),
    ] = 600.0
    allow_pickled_weights: Annotated[
        bool,
        option("take weight updates that a trainer has pickled; the pickle may name what makes tensors, and no more"),
    ] = False
    enable_memory_saver: Annotated[
        bool, option("give the device's memory back when a trainer asks for it, with /release_memory_occupation")
    ] = True
    profile_folder: Annotated[
        str,
        option("folder for the traces of profiles; empty: one in the system's temporary folder", metavar="FOLDER"),
    ] = ""
    health_deadline_s: Annotated[float, option("longest time that a health check may take", unit="s", gt=0)] = 30.0

    @property
    def ranks(self) -> Ranks:
        """The worker's ranks. Raises UsageError if the attention groups do not come out even."""
        return choose_ranks(tp=self.tp, dp=self.dp, ep=self.ep)


class ServerOptions(Struct, frozen=True, kw_only=True):
    """The HTTP side of a process."""

    host: Annotated[str, option("address to listen on")] = "127.0.0.1"
    port: Annotated[int, option("port to listen on", ge=1, le=65535)] = 8000
    api_key: Annotated[
        str,
        option("key that clients must send as `Authorization: Bearer KEY`; empty: none is asked for", metavar="KEY"),
    ] = ""
    max_open_requests: Annotated[
        int,
        option("answers that may run or wait at a time, before more get a 429", unit="requests", ge=1, le=2**24),
    ] = 16384
    max_body_bytes: Annotated[int, option("largest request body", unit="bytes", ge=1024)] = 64 * 2**20
    max_weights_bytes: Annotated[
        int, option("largest body of a weight update; it is kept in memory until it is loaded", unit="bytes", ge=1024)
    ] = 64 * 2**30
    request_deadline_s: Annotated[float, option("longest time that a request may take", unit="s", gt=0)] = 1800.0
    write_deadline_s: Annotated[
        float, option("longest time that a client may take nothing of its answer", unit="s", gt=0)
    ] = 60.0
    shutdown_deadline_s: Annotated[float, option("longest time that stopping may take", unit="s", gt=0)] = 10.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], option("least important line that is logged")
    ] = "info"


class RegistrationOptions(Struct, frozen=True, kw_only=True):
    """How a worker joins a router by itself."""

    register: Annotated[
        str,
        option("URL of a router to join, again and again, and to leave at the end; empty: none", metavar="ROUTER_URL"),
    ] = ""
    register_key: Annotated[str, option("the router's API key; empty: it asks for none", metavar="KEY")] = ""
    advertise_url: Annotated[
        str, option("where the router finds this worker; empty: at --host and --port", metavar="URL")
    ] = ""
    register_lease_s: Annotated[
        float,
        option("how long the router keeps this worker without a word; it joins again every third", unit="s", gt=0),
    ] = 30.0


# ------------------------------------------------------------------------------------------------ from flags and TOML


def parse_config(config_type: type[Config], argv: list[str], *, prog: str, description: str) -> Config:
    """Read a role's config from command-line arguments and, with `--config FILE`, a TOML file.

    Raises UsageError with the option's name for anything that cannot be used. `--help` prints and exits, as argparse does.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options, by the same names")
    options = _options_of(config_type)
    for group_name, group_type in _groups_of(config_type):
        group_arguments = parser.add_argument_group(group_name, _first_line(group_type))
        for opt in options.values():
            if opt.group == group_name:
                opt.add_to(group_arguments)
    arguments = vars(parser.parse_args(argv))
    values: dict[str, object] = {}
    if path := arguments.pop("config"):
        values |= _read_toml(Path(path), options)
    values |= {name: value for name, value in arguments.items() if value is not None}
    return _build(config_type, values)


def check_url(flag: str, url: str) -> None:
    """Check an HTTP URL that an operator named. Raises UsageError, which names the flag."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise UsageError(f"{flag} {url}: {error}") from error
    if not usable or parts.query or parts.fragment:
        raise UsageError(f"{flag} {url}: not a URL like http://host:port")


def to_flags(config: Struct) -> list[str]:
    """Write a config as the flags that `parse_config` reads it from; how a process hands its config to a child."""
    flags: list[str] = []
    for group_name, _ in _groups_of(type(config)):
        for name, value in msgspec.structs.asdict(getattr(config, group_name)).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                for item in value:
                    flags += [flag, *(map(str, item) if isinstance(item, tuple) else [str(item)])]
            else:
                flags.append(f"{flag}={value}")
    return flags


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as UsageError instead of an exit."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


class _Option(Struct, frozen=True):
    """One declared option, ready to become a flag."""

    group: str
    name: str
    type: Any
    meta: Meta
    default: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def add_to(self, arguments: argparse._ArgumentGroup) -> None:
        extra = self.meta.extra or {}
        notes = [str(extra["unit"])] if extra.get("unit") else []
        if self.default is not msgspec.NODEFAULT and self.default != ():
            notes.append(f"default {self.default}")
        text = (self.meta.description or "") + (f" ({', '.join(notes)})" if notes else "")
        settings: dict[str, Any] = {"dest": self.name, "default": None, "help": text.replace("%", "%%")}
        if self.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["metavar"] = extra.get("metavar") or (
                self.name.upper() if get_origin(self.type) is not Literal else None
            )
            if get_origin(self.type) is Literal:
                settings["choices"] = get_args(self.type)
            if get_origin(self.type) is tuple:
                item = get_args(self.type)[0]
                settings["action"] = "append"
                if get_origin(item) is tuple:
                    settings["nargs"] = len(get_args(item))
        arguments.add_argument(self.flag, **settings)


def _groups_of(config_type: type[Struct]) -> list[tuple[str, type[Struct]]]:
    return [(field.name, field.type) for field in msgspec.structs.fields(config_type)]


def _options_of(config_type: type[Struct]) -> dict[str, _Option]:
    options: dict[str, _Option] = {}
    for group_name, group_type in _groups_of(config_type):
        hints = get_type_hints(group_type, include_extras=True)
        for field in msgspec.structs.fields(group_type):
            declared, meta = get_args(hints[field.name])
            assert field.name not in options, f"two options are named {field.name}"
            options[field.name] = _Option(group_name, field.name, declared, meta, field.default)
    return options


def _read_toml(path: Path, options: dict[str, _Option]) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    flat = {name.replace("-", "_"): value for name, value in values.items()}
    for name in flat:
        if name not in options:
            raise UsageError(f"--config {path}: unknown option {name!r}")
    return flat


def _build(config_type: type[Config], values: dict[str, object]) -> Config:
    groups: dict[str, dict[str, object]] = {name: {} for name, _ in _groups_of(config_type)}
    for name, opt in _options_of(config_type).items():
        if name in values:
            groups[opt.group][name] = _convert(opt, values[name])
        elif opt.default is msgspec.NODEFAULT:
            raise UsageError(f"{opt.flag} is required: {opt.meta.description}")
    return msgspec.convert(groups, config_type)


def _convert(opt: _Option, value: object) -> object:
    try:
        converted = msgspec.to_builtins(msgspec.convert(value, Annotated[opt.type, opt.meta], strict=False))
    except msgspec.ValidationError as error:
        raise UsageError(f"{opt.flag} {value}: {error}") from error
    # A deadline that never comes is none.
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UsageError(f"{opt.flag} {value}: expected a finite number")
    return converted


def _first_line(owner: type) -> str:
    return (owner.__doc__ or "").strip().splitlines()[0]
