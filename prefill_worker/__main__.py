"""`python -m prefill_worker`."""

from common.process import run_main
from prefill_worker.process import main

run_main(main)
