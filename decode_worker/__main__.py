"""`python -m decode_worker`."""

from common.process import run_main
from decode_worker.process import main

run_main(main)
