"""Trains a recipe and says whether its accuracy is the expected one.

  python -m vitcls.analysis.reproduce quickstart

NAME is a file of configs/ or a path; arguments may follow, as in quickstart:init=scratch. The
file's EXPECTED holds the accuracies that were measured or published, with their source. vitcls.main
does the run; the same command resumes it after an interruption. --set changes a field, to see what
that does to the result:

  python -m vitcls.analysis.reproduce quickstart --set=optim.lr=1.0 --workdir=runs/spoilt

The answer is printed and saved in the workdir as reproduced.json. It is "inside" if the accuracy is
where 95 of 100 runs are expected: in Student's t prediction interval of one more run. If only one
run is known, the interval covers two tests on different images. One correct run in twenty is
outside: another --set=train.seed= tells chance from a mistake.

Exit codes: 0 inside, 88 outside, otherwise that of vitcls.main, which did not finish.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import write_json
from vitcls.folders import ownership
from vitcls.folders.workdir import Workdir
from vitcls.processes import signals

_WORKDIR = flags.DEFINE(
    cli.PATH,
    "workdir",
    "",
    "Folder of the run; empty: runs/reproduce/NAME. A finished run is not repeated.",
)
_SET = flags.DEFINE_multi_string(
    "set", None, "FIELD=VALUE: a field of the config, as --config.FIELD=VALUE of vitcls.main."
)  # fmt: skip

_OUTSIDE = 88  # exit code


def main(names: list[str]) -> None:
    """Checks the flags, trains, compares."""
    if len(names) > 1:
        raise UserError(f"{names[1]!r} is one NAME too many: name one recipe.")
    changes = _SET.value or []
    for item in changes:
        if not re.match(r"[a-z]\w*\.[\w.]+=", item):
            raise UserError(f"--set={item} is not of the form FIELD=VALUE, such as optim.lr=0.001.")
    from vitcls.analysis import expectation

    config, expected = expectation.find_expected(names[0])
    folder = re.sub(r"[^\w.,=+-]+", "-", names[0].removesuffix(".py"))
    workdir = Path(_WORKDIR.value or f"runs/reproduce/{folder}")
    ownership.check(
        "--workdir", workdir, ["reproduced.json"],
        is_own=lambda: ownership.has_keys(workdir / "reproduced.json", "inside", "answer"),
    )  # fmt: skip
    command = [sys.executable, "-m", "vitcls.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{item}" for item in changes]
    print(shlex.join(["python", *command[1:]]), flush=True)
    if code := _run(command):
        sys.exit(code)
    splits = json.loads(Workdir(workdir).results.read_text())["splits"]
    if expected.split not in splits:
        raise UserError(
            f"The run has no {expected.split} accuracy, but that is the expected one: put "
            f"{expected.split!r} in data.eval_splits."
        )
    accuracy, num_images = (splits[expected.split][key] for key in ("accuracy", "num_examples"))
    is_inside, sentence = expectation.check_accuracy(expected, accuracy, num_images)

    found = {"inside": is_inside, "answer": sentence, "expected": list(expected.accuracies)}
    write_json(workdir / "reproduced.json", found | {"set": changes})
    print(sentence)
    if not is_inside:
        sys.exit(_OUTSIDE)


def _run(command: list[str]) -> int:
    """Runs the command to its end, and passes every signal that arrives here on once."""
    with subprocess.Popen(command, start_new_session=True) as process:
        for number in signals.heeded():
            signal.signal(number, lambda number, frame: process.send_signal(number))
        code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    cli.run(main, arguments="NAME")
