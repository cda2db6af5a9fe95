from common.process import run_main
from deploy.replay.command import main

run_main(main)
