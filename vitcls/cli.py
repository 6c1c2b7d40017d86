"""What all commands share: flags, help, logging, and the exit code of every way to end."""

import contextlib
import glob
import hashlib
import logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from absl import flags

from vitcls.config.checks import drop_unused
from vitcls.errors import STORAGE_ERRNOS, UserError
from vitcls.files import expand
from vitcls.folders import user_folders
from vitcls.processes import signals

FLAGS = flags.FLAGS


class _PathParser(flags.ArgumentParser):
    """A path, whose `~` is the home folder, which a shell leaves as it is after a `=`."""

    def parse(self, argument: str) -> str:
        return str(expand(argument)) if argument.startswith("~") else argument


# Of flags that are paths: `flags.DEFINE(cli.PATH, "output", None, "...")`.
PATH = _PathParser()

log = logging.getLogger("vitcls")


def run(main: Callable[..., None], *, arguments: str = "") -> None:
    """Parses the flags, calls `main` and exits with the code that DESIGN's table gives.

    `main` is given what the command line has beside flags, as a list of one or more, where
    `arguments` says what that is, such as "DIR"; otherwise nothing, and there may be nothing.

    0 finished or `--help`; 2 the user's mistake, one message without a traceback; 69 a device is
    not available; 74 storage; 75 stopped by a signal after saving; 86 stuck
    (`vitcls.processes.watchdog`); 87 non-finite loss; 1 anything else. If one of several processes
    ends with an error, all end with its code.
    """
    main_module = sys.modules["__main__"]
    # Names of classes and files may hold what the terminal's encoding lacks.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # A stream that became a pipe since it was opened refuses to be asked where it is.
        with contextlib.suppress(OSError):
            stream.reconfigure(errors="backslashreplace")
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(_help(main_module))
        sys.exit(0)
    start_logging()
    # Ends as errors do, so that half-written files are removed; training's loop has its own way.
    for number in signals.heeded((signal.SIGTERM, signal.SIGHUP)):
        signal.signal(number, _exit)
    from vitcls.logs import progress  # not at the top: `--help` should not wait for it

    try:
        rest = _parse_flags(sys.argv, arguments)
        name = getattr(main_module.__spec__, "name", "vitcls")
        # A launcher's jobs have logs of their own.
        quiet = contextlib.nullcontext() if name.startswith("launch.") else progress.doing(name)
        with quiet:
            main(*([rest] if arguments else []))
        return
    except SystemExit as error:
        code, message = error.code, "stopped by a signal."
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "Interrupted; what was saved before is kept."
        print(message, file=sys.stderr)
    except BrokenPipeError:  # `| head` closed our output: nothing left to tell anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 1, "its output was closed."
    except Exception as error:
        code, message = _report(error), str(error) or type(error).__name__
    # It imports jax, which a command that ended early has not needed.
    if distributed := sys.modules.get("vitcls.processes.distributed"):
        distributed.leave(code, message)
    sys.exit(code)


def _exit(number: int, frame: FrameType | None) -> None:
    signals.ignore()  # a closed terminal is told twice: nothing must come between
    signals.leave_terminal()
    sys.exit(128 + number)


def start_logging() -> None:
    """Sends the package's log lines to standard error; other libraries only their warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def prepare_jax() -> None:
    """Checks jax's settings and lets it keep what it compiles in the user's cache folder.

    The folder, which may be deleted at any time, is `xla` in `user_folders.cache`, if there is one;
    jax's own `JAX_COMPILATION_CACHE_DIR` names another, `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing.

    Raises:
      UserError: see `devices.check_settings`.
    """
    import jax  # not at the top: `--help` should not wait for it

    from vitcls.step import devices

    _quieten_libraries()
    devices.check_settings()
    cache = user_folders.cache()
    if jax.config.jax_compilation_cache_dir is None and cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla" / _processor()))
    # By default jax keeps only what took a second: the small programs of a start add up to more.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _quieten_libraries() -> None:
    """Keeps C++ libraries from writing more than warnings, before ours, to standard error."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    # libtpu, where it is installed, complains that it does not find a TPU. Chips are these files.
    if not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _processor() -> str:
    """Stands for what programs compiled for this CPU may use; jax's keys know nothing of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    digest = hashlib.sha256(f"{platform.processor()} {features}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def _report(error: Exception) -> int:
    """Prints what a user should read about `error`; returns the exit code."""
    code = getattr(error, "exit_code", None)
    if code is None and isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        code = 74
    # What `Path.expanduser` raises, for any flag or field.
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        error = UserError(
            "A path begins with ~, but this user has no home directory: write it in full, or set "
            "HOME."
        )
        code = error.exit_code
    if code is None:
        traceback.print_exception(error)
        return 1
    print(f"{'ERROR: ' if code != 75 else ''}{error}", file=sys.stderr)
    return code


def _help(main_module) -> str:
    lines = [(main_module.__doc__ or "").strip(), "", "Flags:"]
    for flag in sorted(
        FLAGS.get_key_flags_for_module(main_module.__name__), key=lambda flag: flag.name
    ):
        lines.append(f"  --{flag.name}: {flag.help}")
        if flag.default not in (None, ""):
            lines[-1] += f" (default: {flag.default})"
    return "\n".join(lines)


def required(flag: flags.FlagHolder) -> Any:
    """Returns the value of a flag; raises `UserError` if it is missing or empty."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing. Try --help.")
    return flag.value


def config_value(flag: flags.FlagHolder) -> Any:
    """Returns the config that a `--config` flag loaded.

    What overrides leave without effect, and only the file sets, is at its default.

    Raises:
      UserError: the flag is missing, or its file is.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing. Try --help.")
    try:
        flag.value.keys()  # ml_collections reports a missing file at the first access only
    except OSError as error:
        path = FLAGS[flag.name].config_filename.split(":")[0]
        raise UserError(
            f"--{flag.name}={path} cannot be read; it names a Python file such as "
            "configs/quickstart.py."
        ) from error
    drop_unused(flag.value, given=FLAGS[flag.name].override_values)
    return flag.value


def _parse_flags(argv: list[str], arguments: str) -> list[str]:
    """Returns what is no flag."""
    try:
        FLAGS.set_gnu_getopt()  # flags may follow what is no flag
        _, *rest = map(_expand_config, FLAGS(list(map(_expand_config, argv))))
    except Exception as error:  # flags.Error, or whatever running a config file raises
        raise UserError(explain(error)) from error
    if rest and not arguments:
        raise UserError(
            f"Unexpected argument {rest[0]!r}: every option starts with --. Try --help."
        )
    if arguments and not rest:
        raise UserError(f"{arguments} is missing. Try --help.")
    return rest


def _expand_config(argument: str) -> str:
    """Of `--config=~/FILE.py`, whose parser takes no path as `PATH` does, and of bare arguments."""
    before, path = re.fullmatch(r"(--?config=)?(.*)", argument, re.DOTALL).groups()
    return f"{before or ''}{expand(path)}" if path.startswith("~") else argument


def explain(error: Exception) -> str:
    """The message of an error that came up while flags were parsed and the config file was run."""
    chain = [error]  # absl and ml_collections wrap what a config file raises, with its traceback
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    if isinstance(chain[-1], UserError):
        return str(chain[-1])
    for cause in reversed(chain):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if frame.name == "get_config":
                text = f"{type(cause).__name__}: {cause}"
                return f"{frame.filename}, line {frame.lineno}: {text}"
    if isinstance(error, flags.Error):
        # ml_collections puts a traceback into the text; its last line says what happened.
        text = str(error).strip().splitlines()
        text = text[-1] if any(line.startswith("Traceback") for line in text) else "\n".join(text)
        return f"{text}\nTry --help."
    if isinstance(error, KeyError):  # an override of a field in a group that does not exist
        return f"--config has no such field: {error.args[0]}"
    return f"--config: its file cannot be used: {type(error).__name__}: {error}"
