from common.process import run_main
from deploy.soak.command import main

run_main(main)
