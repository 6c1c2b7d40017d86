"""What all commands share: flags, help, logging and exit codes."""

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
from ml_collections import config_flags

from vitcls.config.checks import drop_unused
from vitcls.errors import STORAGE_ERRNOS, UserError
from vitcls.files import expand
from vitcls.folders import user_folders
from vitcls.processes import signals

FLAGS = flags.FLAGS
# A flag belongs to the command that calls `define_...`: `--help` lists that command's flags.
flags.disclaim_key_flags()


class _PathParser(flags.ArgumentParser):
    """A path in which `~` is the home folder; after a `=` the shell does not expand it."""

    def parse(self, argument: str) -> str:
        return str(expand(argument)) if argument.startswith("~") else argument


# For flags that are paths: `flags.DEFINE(cli.PATH, "output", None, "...")`.
PATH = _PathParser()

log = logging.getLogger("vitcls")


def run(main: Callable[..., None], *, arguments: str = "") -> None:
    """Parses the flags, calls `main` and exits with one of the codes below.

    If `arguments` is set (e.g. "DIR"), `main` receives the positional arguments, at least one.
    Otherwise positional arguments are an error.

    Exit codes: 0 finished or `--help`; 2 the user's mistake, one message without a traceback; 69 a
    device is not available; 74 storage; 75 stopped by a signal after saving; 86 stuck
    (`vitcls.processes.watchdog`); 87 non-finite loss; 1 anything else. If one of several processes
    ends with an error, all end with its code.
    """
    main_module = sys.modules["__main__"]
    # Names of classes and files may have characters that the terminal's encoding lacks.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Reconfiguring asks for the position, which a stream that became a pipe does not have.
        with contextlib.suppress(OSError):
            stream.reconfigure(errors="backslashreplace")
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(_help(main_module))
        sys.exit(0)
    start_logging()
    # A signal ends the command as an error does, so that half-written files are removed. The
    # training loop handles signals itself.
    for number in signals.heeded((signal.SIGTERM, signal.SIGHUP)):
        signal.signal(number, _exit)
    from vitcls.logs import progress  # not at the top: `--help` should not wait for it

    try:
        rest = _parse_flags(sys.argv, arguments)
        name = getattr(main_module.__spec__, "name", "vitcls")
        # The jobs of a launcher have logs of their own.
        reporting = contextlib.nullcontext() if name.startswith("launch.") else progress.doing(name)
        with reporting:
            main(*([rest] if arguments else []))
        return
    except SystemExit as error:
        code, message = error.code, "stopped by a signal."
    except KeyboardInterrupt:
        code, message = 128 + signal.SIGINT, "Interrupted. Everything saved before is kept."
        print(message, file=sys.stderr)
    except BrokenPipeError:  # `| head` closed the output: no message would be read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 1, "its output was closed."
    except Exception as error:
        code, message = _report(error), str(error) or type(error).__name__
    # The module imports jax. A command that ended early has not imported it.
    if distributed := sys.modules.get("vitcls.processes.distributed"):
        distributed.leave(code, message)
    sys.exit(code)


def _exit(number: int, frame: FrameType | None) -> None:
    # A closed terminal sends two signals. The second must not interrupt the clean-up.
    signals.ignore()
    signals.leave_terminal()
    sys.exit(128 + number)


def start_logging() -> None:
    """Sends the package's log lines to standard error, and only warnings of other libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def prepare_jax() -> None:
    """Checks jax's settings and makes it cache compiled programs in the user's cache folder.

    The folder is `xla` in `user_folders.cache`, if there is one; it may be deleted at any time.
    `JAX_COMPILATION_CACHE_DIR` names another, and `JAX_ENABLE_COMPILATION_CACHE=false` turns
    caching off.

    Raises:
      UserError: See `devices.check_settings`.
    """
    import jax  # not at the top: `--help` should not wait for it

    from vitcls.processes import devices

    _quieten_libraries()
    devices.check_settings()
    cache = user_folders.cache()
    if jax.config.jax_compilation_cache_dir is None and cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla" / _processor()))
    # By default jax caches only programs that took a second to compile. A start compiles many small
    # ones, which take longer in all.
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
    """Names the instruction set of this CPU, which jax's cache keys leave out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    digest = hashlib.sha256(f"{platform.processor()} {features}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def _report(error: Exception) -> int:
    """Prints the message of `error` for the user; returns the exit code."""
    code = getattr(error, "exit_code", None)
    if code is None and isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        code = 74
    # `Path.expanduser` raises this for any flag or field.
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        error = UserError(
            "A path begins with ~, but this user has no home directory: write the path in full, or "
            "set HOME."
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


def define_config(note: str = "") -> flags.FlagHolder:
    """Defines --config, whose value `config_value` returns."""
    # Unknown fields are accepted here: `check_config` refuses them and suggests the nearest name.
    # Fields such as `--config.optim.args.NAME=` are not known beforehand.
    text = _join("File with the recipe: FILE.py, or FILE.py:name=value,... with arguments.", note)
    return config_flags.DEFINE_config_file(
        "config", None, text, lock_config=False, accept_new_attributes=True
    )


def define_checkpoint(note: str = "") -> flags.FlagHolder:
    """Defines --checkpoint, for `pretrained.load`."""
    text = (
        "Workdir of a run, optionally with @best, @last or @STEP; folder in Hugging Face format; "
        "or hub id, optionally with @REVISION."
    )
    return flags.DEFINE_string("checkpoint", None, _join(text, note))


def define_images(note: str = "") -> flags.FlagHolder:
    """Defines --images, for `predict.rows.find_images`."""
    text = (
        "A file; a folder, searched recursively; a pattern in quotes, such as 'photos/**/*.jpg'; "
        "or @FILE with one path per line, relative to FILE's folder."
    )
    return flags.DEFINE_string("images", "", _join(text, note))


def define_data(note: str = "") -> flags.FlagHolder:
    """Defines --data, for `sources.open_split`."""
    text = "Data set, such as digits, folder:PATH, csv:PATH or tfds:NAME[/CONFIG][:VERSION]."
    return flags.DEFINE_string("data", "", _join(text, note))


def define_split(
    meaning: str, *, name: str = "split", default: str = "test", note: str = ""
) -> flags.FlagHolder:
    """Defines the flag of a split, for `sources.open_split`."""
    text = f"{meaning}; tfds also takes slices, such as train[:90%]."
    return flags.DEFINE_string(name, default, _join(text, note))


def define_data_dir(if_empty: str = "tensorflow_datasets' default") -> flags.FlagHolder:
    """Defines --data_dir, for `sources.open_split`."""
    text = f"Folder of prepared data sets. Empty: {if_empty}."
    return flags.DEFINE(PATH, "data_dir", "", text)


def define_labels() -> flags.FlagHolder:
    """Defines --labels, the argument `by` of `classes.match`."""
    return flags.DEFINE_enum(
        "labels", "name", ["name", "index"],
        "How the data's classes are found among the checkpoint's: by name, or by position.",
    )  # fmt: skip


def define_on_error() -> flags.FlagHolder:
    """Defines --on_error, for commands that write into a folder."""
    return flags.DEFINE_enum(
        "on_error", "raise", ["raise", "skip"],
        "Images that cannot be decoded: raise an error, or skip and list them in "
        "OUTPUT/skipped.jsonl.",
    )  # fmt: skip


def define_batch_size() -> flags.FlagHolder:
    """Defines --batch_size, for `inference.compile_step`."""
    return flags.DEFINE_integer(
        "batch_size", 0,
        "Images per step over all devices. 0: as many as are useful and fit into memory.",
        lower_bound=0,
    )  # fmt: skip


def define_reject() -> flags.FlagHolder:
    """Defines --reject, for `decision.kept.require`."""
    return flags.DEFINE_bool(
        "reject", False,
        "Do not answer images below the threshold of the checkpoint's decision.json "
        "(docs/decision.md).",
    )  # fmt: skip


def define_new_folder() -> flags.FlagHolder:
    """Defines --output, for `files.folder_aside`."""
    return flags.DEFINE(PATH, "output", None, "Folder to make; if it exists, it must be empty.")


def _join(text: str, note: str) -> str:
    return f"{text} {note}" if note else text


def required(flag: flags.FlagHolder) -> Any:
    """Returns the value of a flag; raises `UserError` if it is empty."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing. Try --help.")
    return flag.value


def config_value(flag: flags.FlagHolder) -> Any:
    """Returns the config that a `--config` flag loaded.

    A field that only the file sets, and that an override leaves without effect, has its default.

    Raises:
      UserError: The flag or its file is missing.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing. Try --help.")
    try:
        flag.value.keys()  # ml_collections reports a missing file only at the first access
    except OSError as error:
        path = FLAGS[flag.name].config_filename.split(":")[0]
        raise UserError(
            f"--{flag.name}={path} cannot be read; name a Python file such as "
            "configs/quickstart.py."
        ) from error
    drop_unused(flag.value, given=FLAGS[flag.name].override_values)
    return flag.value


def _parse_flags(argv: list[str], arguments: str) -> list[str]:
    """Returns the positional arguments."""
    try:
        FLAGS.set_gnu_getopt()  # flags may follow positional arguments
        _, *rest = map(_expand_config, FLAGS(list(map(_expand_config, argv))))
    except Exception as error:  # flags.Error, or any error of a config file
        raise UserError(explain(error)) from error
    if rest and not arguments:
        raise UserError(
            f"Unexpected argument {rest[0]!r}: every option starts with --. Try --help."
        )
    if arguments and not rest:
        raise UserError(f"{arguments} is missing. Try --help.")
    return rest


def _expand_config(argument: str) -> str:
    """Expands ~ in `--config=~/FILE.py`, whose parser is not `PATH`, and in other arguments."""
    before, path = re.fullmatch(r"(--?config=)?(.*)", argument, re.DOTALL).groups()
    return f"{before or ''}{expand(path)}" if path.startswith("~") else argument


def explain(error: Exception) -> str:
    """The message of an error that parsing the flags or running the config file raised."""
    chain = [error]  # absl and ml_collections wrap the error of a config file
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
        # ml_collections puts a traceback into the text. The last line is the error itself.
        text = str(error).strip().splitlines()
        text = text[-1] if any(line.startswith("Traceback") for line in text) else "\n".join(text)
        return f"{text}\nTry --help."
    if isinstance(error, KeyError):  # an override of a field in a group that does not exist
        return f"--config has no such field: {error.args[0]}"
    return f"The file of --config cannot be used: {type(error).__name__}: {error}"
