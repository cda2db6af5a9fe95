"""Log lines on stderr, one format for every process; stdout belongs to the launcher's `ready` line and to reports."""

import logging
import sys

FORMAT = "%(asctime)s.%(msecs)03d %(levelname).1s {process} %(name)s: %(message)s"


def configure_logging(process: str, level: str) -> None:
    """Send this process's log to stderr, each line tagged with `process` (for example `decode/engine`)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT.format(process=process), datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("nixl", "httpx", "urllib3", "asyncio", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(max(root.level, logging.WARNING))
