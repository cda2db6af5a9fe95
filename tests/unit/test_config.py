"""Config from flags and TOML: every option of every role, its bounds and its defaults; what cannot be used names the option."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from common.config import option, parse_config, to_flags
from common.errors import UsageError
from decode_worker.config import DecodeConfig
from deploy.aggregated_config import AggregatedConfig
from prefill_worker.config import PrefillConfig
from prefill_worker.process import read_config as read_prefill_config
from router.config import RouterConfig

REQUIRED: dict[type[Struct], list[str]] = {
    PrefillConfig: ["--model", "m"],
    DecodeConfig: ["--model", "m"],
    AggregatedConfig: ["--model", "m"],
    RouterConfig: ["--prefill", "http://p:1", "8998", "--decode", "http://d:1"],
}
ROLES = list(REQUIRED)


def parse(config_type: type[Struct], *argv: str) -> Any:
    return parse_config(config_type, list(argv), prog="test", description="Test.")


def options_of(config_type: type[Struct]) -> dict[str, tuple[str, Any, Meta]]:
    """Name -> (group, type, meta), read from the declarations without the code under test."""
    found = {}
    for group in msgspec.structs.fields(config_type):
        for name, hint in get_type_hints(group.type, include_extras=True).items():
            declared, meta = get_args(hint)
            found[name] = (group.name, declared, meta)
    return found


ALL = [(role, name) for role in ROLES for name in options_of(role)]
NUMBERS = [(role, name) for role, name in ALL if options_of(role)[name][1] in (int, float)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------ bounds


def just_inside_and_outside(kind: type, meta: Meta) -> tuple[list[float], list[float]]:
    step = 1 if kind is int else 1e-9
    inside, outside = [], []
    if meta.ge is not None:
        inside.append(meta.ge)
        outside.append(meta.ge - step)
    if meta.gt is not None:
        inside.append(meta.gt + step)
        outside += [meta.gt, meta.gt - step]
    if meta.le is not None:
        inside.append(meta.le)
        outside.append(meta.le + step)
    return inside, outside


@pytest.mark.parametrize(("role", "name"), NUMBERS)
def test_every_bound(role: type[Struct], name: str, tmp_path: Path):
    """Every number has a lower bound; its ends are accepted and what is beyond them is not, as a flag and from a file."""
    group, kind, meta = options_of(role)[name]
    inside, outside = just_inside_and_outside(kind, meta)
    assert outside, "a number without bounds"
    file = tmp_path / "config.toml"
    for value in inside:
        config = parse(role, *REQUIRED[role], f"{flag(name)}={kind(value)}")
        assert getattr(getattr(config, group), name) == kind(value)
    for value in outside:
        with pytest.raises(UsageError, match=f"^{flag(name)} "):
            parse(role, *REQUIRED[role], f"{flag(name)}={kind(value)}")
        file.write_text(f"{name} = {kind(value)}")
        with pytest.raises(UsageError, match=f"^{flag(name)} "):
            parse(role, *REQUIRED[role], "--config", str(file))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 0),
        ("page_size", 1025),
        ("max_running_requests", 0),
        ("max_running_requests", 65537),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.001),
        ("kv_pool_tokens", -1),
        ("port", 0),
        ("port", 65536),
        ("bootstrap_port", 65536),
        ("chunked_prefill_tokens", 0),
        ("lease_s", 0.0),
        ("request_deadline_s", -1.0),
        ("max_body_bytes", 1023),
        ("max_quarantine", 0.0),
        ("max_quarantine", 1.1),
        ("watchdog_s", 0.0),
        ("engine_deadline_s", 2.0),
        ("write_deadline_s", 0.0),
    ],
)
def test_bounds_that_must_be_there(name: str, value: float):
    """By hand, since the test above believes the declarations."""
    with pytest.raises(UsageError, match=f"^{flag(name)} "):
        parse(PrefillConfig, "--model", "m", f"{flag(name)}={value}")


@pytest.mark.parametrize(("role", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "x", "", "1.5.0", "true"])
def test_what_is_no_number_is_refused(role: type[Struct], name: str, value: str):
    with pytest.raises(UsageError, match=f"^{flag(name)} "):
        parse(role, *REQUIRED[role], f"{flag(name)}={value}")


@pytest.mark.parametrize(("role", "name"), [(r, n) for r, n in ALL if get_origin(options_of(r)[n][1]) is Literal])
def test_every_choice_and_no_other(role: type[Struct], name: str, tmp_path: Path):
    group, kind, _ = options_of(role)[name]
    for choice in get_args(kind):
        config = parse(role, *REQUIRED[role], flag(name), choice)
        assert getattr(getattr(config, group), name) == choice
    with pytest.raises(UsageError, match=flag(name)):
        parse(role, *REQUIRED[role], flag(name), "no-such")
    file = tmp_path / "config.toml"
    file.write_text(f'{name} = "no-such"')
    with pytest.raises(UsageError, match=flag(name)):
        parse(role, *REQUIRED[role], "--config", str(file))


@pytest.mark.parametrize(("role", "name"), [(r, n) for r, n in ALL if options_of(r)[n][1] is bool])
def test_every_switch_both_ways(role: type[Struct], name: str):
    group = options_of(role)[name][0]
    for argument, expected in ((flag(name), True), (flag(name).replace("--", "--no-", 1), False)):
        config = parse(role, *REQUIRED[role], argument)
        assert getattr(getattr(config, group), name) is expected


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("role", "missing"),
    [(PrefillConfig, "--model"), (DecodeConfig, "--model"), (AggregatedConfig, "--model")],
)
def test_a_required_option_that_is_missing_is_named(role: type[Struct], missing: str):
    argv = REQUIRED[role]
    index = argv.index(missing)
    stop = next((i for i in range(index + 1, len(argv)) if argv[i].startswith("--")), len(argv))
    with pytest.raises(UsageError, match=f"^{missing} is required"):
        parse(role, *argv[:index], *argv[stop:])


@pytest.mark.parametrize("argument", ["--no-such=1", "--page-siz=4", "--no-page-size", "stray"])
def test_an_unknown_flag_is_refused(argument: str):
    """Abbreviations too: a flag that is added later must not change what an old command means."""
    with pytest.raises(UsageError, match=argument.split("=")[0]):
        parse(PrefillConfig, "--model", "m", argument)


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_described(role: type[Struct], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        parse(role, "--help")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, _, meta) in options_of(role).items():
        assert flag(name) in text
        assert meta.description is not None
        assert " ".join(meta.description.split()) in text


def test_names_are_unique_across_groups() -> None:
    class Group(Struct, frozen=True, kw_only=True):
        """A group."""

        size: Annotated[int, option("a size", ge=0)] = 0

    class Twice(Struct, frozen=True):
        """Two groups with one name."""

        first: Group
        second: Group

    with pytest.raises(AssertionError, match="two options are named size"):
        parse(Twice)


def test_config_is_frozen():
    config = parse(PrefillConfig, "--model", "m")
    for target in (config, config.engine):
        with pytest.raises(AttributeError):
            setattr(target, msgspec.structs.fields(target)[0].name, 1)


# ------------------------------------------------------------------------------------------------ TOML


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str | bytes], str]:
    """Write a file and return its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "config.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_defaults_then_the_file_then_the_flags(toml: Callable[[str], str]):
    file = toml('model = "from-file"\npage-size = 32\noverlap = false\nmemory_fraction = 0.5\nport = 7')
    config = parse(PrefillConfig, "--config", file, "--page-size", "64", "--overlap")
    assert config.model.model == "from-file"
    assert (config.engine.page_size, config.engine.overlap) == (64, True)
    assert (config.engine.memory_fraction, config.server.port) == (0.5, 7)
    assert config.engine.max_running_requests == 256


def test_repeatable_options_from_a_file_and_from_flags(toml: Callable[[str], str]):
    file = toml('prefill = [["http://a", 1], ["http://b", 2]]\ndecode = ["http://c"]')
    config = parse(RouterConfig, "--config", file)
    assert config.router.prefill == (("http://a", 1), ("http://b", 2))
    assert config.router.decode == ("http://c",)
    argv = ["--prefill", "http://x", "3", "--prefill", "http://y", "4", "--decode", "http://z", "--decode", "http://w"]
    config = parse(RouterConfig, "--config", file, *argv)
    assert config.router.prefill == (("http://x", 3), ("http://y", 4))
    assert config.router.decode == ("http://z", "http://w")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--prefill", "http://x"], "--prefill"),
        (["--prefill", "http://x", "port"], "--prefill"),
        (["--prefill", "http://x", "1", "2"], "2"),
        (["--decode"], "--decode"),
    ],
)
def test_repeatable_options_that_are_malformed(argv: list[str], name: str):
    with pytest.raises(UsageError, match=name):
        parse(RouterConfig, *REQUIRED[RouterConfig], *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such = 1", "unknown option 'no_such'"),
        ("[engine]\npage_size = 1", "unknown option 'engine'"),
        ('config = "other.toml"', "unknown option 'config'"),
        ("page_size = ", "config.toml"),
        ('page_size = "many"', "--page-size"),
        ("page_size = [1]", "--page-size"),
        ("page_size = 1.5", "--page-size"),
        ("page_size = true", "--page-size"),
        ("lease_s = nan", "--lease-s"),
        ("lease_s = inf", "--lease-s"),
        ("request_deadline_s = +inf", "--request-deadline-s inf: expected a finite number"),
        ("model = 5", "--model"),
        ("model = 2024-01-01", "--model"),
        ('overlap = "maybe"', "--overlap"),
        (b"model = '\xff\xfe'", "config.toml"),
    ],
)
def test_files_that_cannot_be_used(toml: Callable[[str | bytes], str], text: str | bytes, message: str):
    argv = [] if "model" in str(text) else ["--model", "m"]
    with pytest.raises(UsageError, match=message):
        parse(PrefillConfig, *argv, "--config", toml(text))


def test_a_file_that_is_not_there(tmp_path: Path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match=f"--config {path}"):
            parse(PrefillConfig, "--model", "m", "--config", str(path))


# ------------------------------------------------------------------------------------------------ there and back


def value_of(kind: Any, meta: Meta) -> st.SearchStrategy[Any]:
    """Any value that an option may have."""
    if kind is bool:
        return st.booleans()
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is int:
        assert meta.ge is not None
        return st.integers(int(meta.ge), int(meta.le) if meta.le is not None else 2**60)
    if kind is float:
        assert meta.gt is not None
        return st.floats(meta.gt, meta.le, exclude_min=True, allow_nan=False, allow_infinity=False)
    if kind is str:
        return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    items = get_args(kind)[0]
    urls = st.text("abc:/.-_1", max_size=8).map("http://".__add__)
    item = st.tuples(urls, st.integers(1, 65535)) if get_origin(items) is tuple else urls
    return st.lists(item, min_size=1, max_size=3).map(tuple)


@st.composite
def configs(draw: st.DrawFn, role: type[Struct]) -> Any:
    groups = {}
    for group in msgspec.structs.fields(role):
        hints = get_type_hints(group.type, include_extras=True)
        groups[group.name] = group.type(**{name: draw(value_of(*get_args(hint))) for name, hint in hints.items()})
    return role(**groups)


@pytest.mark.parametrize("role", ROLES)
def test_flags_say_all_of_a_config(role: type[Struct]) -> None:
    """`parse_config` reads from `to_flags` what was written, whatever the values: dashes, spaces, newlines, tiny floats."""

    @settings(max_examples=60, deadline=None)
    @given(configs(role))
    def there_and_back(config: Struct) -> None:
        assert parse(role, *to_flags(config)) == config

    there_and_back()


# Python before 3.12 takes "--" for the end of the options even behind an equals sign.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(lambda text: text != "--"))
@example("--page-size")
@example("-1")
@example("=")
@example("")
def test_any_string_is_a_value(text: str):
    assert parse(PrefillConfig, f"--model={text}").model.model == text


def test_units_are_seconds_and_tokens():
    """A name tells its unit, and the help repeats it."""
    for role, name in ALL:
        unit = (options_of(role)[name][2].extra or {})["unit"]
        for suffix, expected in (("_s", "s"), ("_tokens", "tokens"), ("_bytes", "bytes"), ("_requests", "requests")):
            if name.endswith(suffix):
                assert unit == expected
    assert math.isfinite(parse(PrefillConfig, "--model", "m").transfer.lease_s)


def test_the_groups_of_a_prefill_worker_have_ports_of_their_own():
    flags = ["--model=m", "--dp=4", "--bootstrap-port"]
    assert read_prefill_config([*flags, "65532"]).prefill.bootstrap_port == 65532
    with pytest.raises(UsageError, match=r"^--bootstrap-port 65533: 4 groups "):
        read_prefill_config([*flags, "65533"])
