"""The import layers: `lint-imports` keeps them, and notices one that is broken."""

import subprocess
import sys
from pathlib import Path

from tests.support.processes import DEADLINE_S, REPOSITORY

LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

BROKEN = """
[importlinter]
root_packages =
    transfer
include_external_packages = True

[importlinter:contract:1]
name = Nobody speaks NIXL
type = forbidden
source_modules =
    transfer
forbidden_modules =
    nixl
"""


def lint(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LINT, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_the_layers_are_kept():
    done = lint()
    assert done.returncode == 0, done.stdout
    assert ", 0 broken." in done.stdout


def test_a_broken_contract_is_noticed(tmp_path: Path):
    config = tmp_path / "contracts.ini"
    config.write_text(BROKEN)
    done = lint("--config", str(config), "--no-cache")
    assert done.returncode == 1
    assert "transfer.agent -> nixl" in done.stdout
