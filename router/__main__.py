from common.process import run_main
from router.process import main

run_main(main)
