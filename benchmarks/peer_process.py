"""Runs a peer's module in a separate process, and a separate environment if needed.

So the thread pools, allocators and libraries of the peer cannot interfere with those of JAX. Calls
and results are lines of JSON on the process' standard input and output.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitcls.errors import UserError

ROOT = Path(__file__).parent.parent


def start_process(module: str, *, python: str | Path = sys.executable) -> Callable[..., Any]:
    """Returns a function that calls functions of `module`, by name, in a new process.

    The process ends with ours, when its standard input closes. Arguments and results are JSON.

    Args:
      module: Full name of the module.
      python: The interpreter, whose environment is used.
    """
    process = subprocess.Popen(
        [python, "-m", "benchmarks.peer_process", module],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip

    def call(function: str, *args: Any, **kwargs: Any) -> Any:
        try:
            process.stdin.write(json.dumps([function, args, kwargs]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there will be no answer
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{module}.{function} ended its process, see its message above.")
        answer = json.loads(line)
        if missing := answer.get("missing"):
            raise UserError(
                f"The peer needs {missing}, which is not installed in the environment of {python}: "
                f"{python} -m pip install {missing}, or use another --peer."
            )
        return answer["result"]

    return call


def serve(module: str) -> None:
    """Answers calls until standard input ends."""
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        function, args, kwargs = json.loads(line)
        try:
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            answer = {"result": result}
        except ModuleNotFoundError as error:
            answer = {"missing": error.name}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
