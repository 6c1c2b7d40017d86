"""Prints every field of the config with its default, its allowed values and its meaning.

  python -m vitcls.config

Set a field with --config.GROUP.FIELD=VALUE when training, or in a config file.
"""

import argparse
import signal
import textwrap

from vitcls.config.checks import bounds
from vitcls.config.field import SET, Field
from vitcls.config.fields import FIELDS


def describe(name: str, field: Field) -> str:
    """Returns the lines about one field."""
    default = "unset" if isinstance(field.default, type) else repr(field.default)
    facts = [field.text]
    if field.among:
        facts.append(f"One of {', '.join(map(repr, field.among))}.")
    if field.at_least is not None:
        facts.append(f"Allowed: {bounds(field)}.")
    if field.needs:
        needed = [key if x is SET else f"{key}={x!r}" for key, x in field.needs.items()]
        facts.append(f"Needs {' and '.join(needed)}.")
    if field.may_change:
        facts.append("May change when a run is continued.")
    # Names and values stay in one piece, so that they can be copied.
    lines = textwrap.wrap(
        " ".join(facts), 100, initial_indent="    ", subsequent_indent="    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([f"{name} = {default}", *lines])


def main() -> None:
    """Prints all fields, an empty line between groups."""
    argparse.ArgumentParser(
        prog="python -m vitcls.config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    # `| head` closes the pipe early. The default action ends the command without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    group = None
    for name, field in FIELDS.items():
        if group not in (None, name.partition(".")[0]):
            print()
        group = name.partition(".")[0]
        print(describe(name, field))


if __name__ == "__main__":
    main()
