"""The launcher over stand-ins for workers and router: `python -m tests.support.stub_stack --model FOLDER ...`."""

from common.process import run_main
from deploy.launch_options import Role, Roles
from deploy.up import launch
from tests.support.stub_server import StubAggregatedConfig, StubDecodeConfig, StubPrefillConfig, StubRouterConfig

MODULE = "tests.support.stub_server"


def stub_roles() -> Roles:
    """Roles whose processes load in a moment and answer their health paths, nothing else."""
    return {
        "prefill": Role(MODULE, StubPrefillConfig),
        "decode": Role(MODULE, StubDecodeConfig),
        "aggregated": Role(MODULE, StubAggregatedConfig),
        "router": Role(MODULE, StubRouterConfig),
    }


def main(argv: list[str]) -> int:
    """Do as `deploy.up.main` does, with the stand-ins."""
    return launch(argv, stub_roles())


if __name__ == "__main__":
    run_main(main)
