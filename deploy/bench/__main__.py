from common.process import run_main
from deploy.bench.command import main

run_main(main)
