"""A minute of faults: processes are killed and stopped under load, and no request hangs, no page leaks, no row is wrong."""

from collections.abc import Callable
from pathlib import Path

from deploy.soak.command import SoakOptions, conclude, soak
from deploy.soak.report import LEAST_ANSWERED


async def test_a_minute_of_faults(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = SoakOptions(minutes=1, seed=5, prompts=24, model=str(checkpoint_of("plain")), log=str(log))
    summary = await soak(options)
    code = conclude(summary)
    said = log.read_text(errors="replace")[-20_000:]
    assert summary.compared.wrong_rows == summary.compared.wrong_tokens == 0, said
    assert summary.unnamed == summary.hung == 0, said
    assert (set(summary.leaked_pages.values()), summary.unclean_workers) == ({0}, []), said
    assert summary.unrecovered == 0, said
    assert summary.answered_part >= LEAST_ANSWERED, said
    assert code == 0
    # It was a soak: requests and rows enough, faults of several kinds, and workers that came back.
    assert summary.answered > 100
    assert summary.compared.rows > 10_000
    assert len(summary.faults) >= 3
    assert summary.restarts >= 1
