"""Commands, each in a process of its own that need not import what takes seconds.

The processes are forked from one that has imported the libraries and has not started a device.
What depends on how Python starts, or on a variable that jax reads when it is imported, is for
`subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# Modules that define flags, such as vitcls.main, would be in the way of other commands.
CONTEXT.set_forkserver_preload(["jax", "optax", "vitcls.train", "vitcls.logs.progress"])


def run(
    module: str, *args: str, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGS...` in the project's folder, as `subprocess.run` returns it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        process = CONTEXT.Process(
            target=_main, args=(module, args, dict(os.environ) | variables, paths)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *args], timeout)
        texts = [path.read_text() for path in paths]
    return subprocess.CompletedProcess([module, *args], process.exitcode, *texts)


def _main(module: str, args: tuple[str, ...], variables: dict[str, str], paths: list[Path]) -> None:
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
