"""The command line of a run, from that of the command which starts it."""

import sys

from ml_collections import ConfigDict

from vitcls.config.checks import check_config
from vitcls.errors import UserError


def overrides() -> list[str]:
    """Returns the `--config.FIELD=VALUE` flags of this process, as they were written."""
    found = []
    for argument in sys.argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name.startswith(("config.", "noconfig.")):
            continue
        if name.startswith("noconfig.") or not equals:
            raise UserError(f"{argument}: write --config.FIELD=VALUE, as runs are given it.")
        found.append(argument)
    return found


def check(config: ConfigDict, *, here: bool) -> None:
    """Raises `UserError` for mistakes in the config of a run, `here` or on other machines."""
    check_config(config if here else _without_local_folders(config))
    from vitcls.step import optim  # imports jax: only once the config is known to be right

    optim.check_args(config.optim.name, dict(config.optim.args))


def _without_local_folders(config: ConfigDict) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config.data.cache = ""  # must exist, but on the machine that trains
    return config
