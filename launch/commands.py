"""The flags of a run, taken from the command that starts it."""

import sys

from ml_collections import ConfigDict

from vitcls.config.checks import check_config
from vitcls.errors import UserError


def overrides() -> list[str]:
    """Returns the `--config.FIELD=VALUE` flags of this process as the user wrote them."""
    found = []
    for argument in sys.argv[1:]:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name.startswith(("config.", "noconfig.")):
            continue
        if name.startswith("noconfig.") or not equals:
            raise UserError(f"{argument} cannot be passed on to runs; write --config.FIELD=VALUE.")
        found.append(argument)
    return found


def check(config: ConfigDict, *, here: bool) -> None:
    """Raises `UserError` for mistakes in a run's config, for this machine (`here`) or another."""
    check_config(config if here else _without_local_folders(config))
    # Imported late: jax takes seconds, and a wrong config should fail before.
    from vitcls.step import optim

    optim.check_args(config.optim.name, dict(config.optim.args))


def _without_local_folders(config: ConfigDict) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    # The folder must exist, but only on the machine that trains.
    config.data.cache = ""
    return config
