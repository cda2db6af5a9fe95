"""The kinds of process that a stack is made of: their modules and their options."""

from decode_worker.config import DecodeConfig
from deploy.aggregated_config import AggregatedConfig
from deploy.launch_options import Role, Roles
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig


def tandem_roles() -> Roles:
    """Name the modules that `python -m` runs, and the config that each one reads its flags with."""
    return {
        "prefill": Role("prefill_worker", PrefillConfig),
        "decode": Role("decode_worker", DecodeConfig),
        "aggregated": Role("deploy.aggregated_worker", AggregatedConfig),
        "router": Role("router", RouterConfig),
    }
