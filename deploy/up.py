"""`python -m deploy.up`: start prefill workers, decode workers and the router on this machine, and watch them.

With `--aggregated` there is one worker behind the router, which does the work of both.

Prints one line on stdout, `ready URL`, once a real request has gone through; everything else is on stderr. SIGINT or
SIGTERM stops all children in order (a second one kills them) and the exit code is 0. A child that ends by itself takes
the others with it: exit code 1, or 2 if the child's complaint was about its options. A child that does not answer its
health check for too long is killed. With `--restart` a child that has ended is started again, and the others go on.

It knows signals and exit codes. Neighbours: `deploy.launch_plan` (what to start), `deploy.stack` (the children).
"""

import asyncio
import logging
import signal
import sys

from common.observability.logging import configure_logging
from common.process import EXIT_USAGE, run_main
from deploy.launch_options import Roles
from deploy.launch_plan import LaunchPlan, plan_launch
from deploy.roles import tandem_roles
from deploy.stack import ChildError, Stack, StackError

log = logging.getLogger("deploy.up")


def main(argv: list[str]) -> int:
    """Run Tandem's own stack."""
    return launch(argv, tandem_roles())


def launch(argv: list[str], roles: Roles) -> int:
    """Run a stack until it is told to stop, or a child ends; returns the exit code."""
    plan = plan_launch(argv, roles)
    configure_logging("up", "info")
    return asyncio.run(_run(plan))


async def _run(plan: LaunchPlan) -> int:
    stack = Stack(plan)
    serving = asyncio.create_task(_serve(stack))
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            stack.kill()
        stopping = True
        serving.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    code = 0
    try:
        await serving
    except asyncio.CancelledError:
        log.info("told to stop")
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE if isinstance(error, ChildError) and error.returncode == EXIT_USAGE else 1
    finally:
        stopping = True
        await stack.stop()
    return code


async def _serve(stack: Stack) -> None:
    await stack.start()
    print(f"ready {stack.url}", flush=True)
    await stack.wait()


if __name__ == "__main__":
    run_main(main)
