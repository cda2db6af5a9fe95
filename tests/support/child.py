"""A child process for tests of `common.process`: says that it is up, then does what its argument names."""

import os
import signal

from common.process import run_main


def main(argv: list[str]) -> None:
    """`sleep` waits for a signal, `stubborn` ignores SIGTERM, `environment` prints the environment's names."""
    if argv == ["environment"]:
        print(*os.environ)
        return
    if argv == ["stubborn"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    run_main(main)
