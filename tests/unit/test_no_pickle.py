"""Nothing in the packages turns data into code: no pickle or its like, no eval, no shell. Read from the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "decode_worker", "deploy", "prefill_worker", "router", "transfer")
MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve", "xmlrpc", "yaml"}
NAMES = {"__import__", "compile", "eval", "exec"}
ATTRIBUTES = {"loads_pyobj", "popen", "recv_pyobj", "send_pyobj", "unsafe_load"}
"""Wherever they are called."""
CALLS = {("os", "system"), ("torch", "load"), ("torch", "save"), ("subprocess", "getoutput")}
READS_PICKLES = ROOT / "common/models/pickled.py"
"""Weights that trainers have pickled, on request alone; it names what a pickle may call."""
ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}
"""May be False, and nothing else."""


def findings(source: str) -> Iterator[str]:
    """Every place in a source that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {alias.name}" for alias in names if alias.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield f"from {module}"
                yield from (f"from {module} import {alias.name}" for alias in names if (module, alias.name) in CALLS)
            case ast.Call(func=func, keywords=keywords):
                yield from _calls(func)
                for keyword in keywords:
                    is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    if keyword.arg in ARGUMENTS and not is_off:
                        yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def _calls(func: ast.expr) -> Iterator[str]:
    match func:
        case ast.Name(id=name) if name in NAMES:
            yield f"{name}()"
        case ast.Attribute(attr=name) if name in ATTRIBUTES:
            yield f".{name}()"
        case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in CALLS:
            yield f"{module}.{name}()"


def test_no_package_runs_what_it_reads():
    sources = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(sources) > 100
    sources.remove(READS_PICKLES)
    found = [f"{path.relative_to(ROOT)}: {what}" for path in sources for what in findings(path.read_text())]
    assert found == []


def test_the_reader_of_pickles_does_nothing_else_of_the_kind():
    assert list(findings(READS_PICKLES.read_text())) == ["import pickle", "torch.load()"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "def f():\n    import dill as d",
        "from pickle import loads",
        "import yaml",
        "from os import system",
        "from torch import load",
        "x = torch.load(path)",
        "x = torch.load(path, weights_only=True)",
        "eval('1')",
        "exec(source)",
        "__import__(name)",
        "socket.recv_pyobj()",
        "os.system('ls')",
        "os.popen('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen(['ls'], shell=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_each_of_them_would_be_found(source: str):
    assert list(findings(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile('a')", "subprocess.run(['ls'], shell=False)", "x = 'import pickle'"]
)
def test_what_is_harmless_is_not(source: str):
    assert list(findings(source)) == []
