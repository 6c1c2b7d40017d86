"""Several processes, one run: how they find each other, what they must agree on, how they end.

They talk through the store of jax's coordinator, which lives in process 0. With one process, every
function here is a no-op.
"""

import atexit
import contextlib
import faulthandler
import hashlib
import itertools
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # the store has no public interface
from jax.sharding import Mesh

from vitcls.errors import STALLED, Unavailable, UserError
from vitcls.processes.devices import settings
from vitcls.step import sharding

log = logging.getLogger("vitcls")

# A process without a sign of life for this long is dead. Then jax ends all others.
_HEARTBEAT_SECS = 30
_SHUTDOWN_SECS = 30
# After another process ended, this one has a while to end by itself: it may be closing its files.
# The coordinator waits longer, because without it jax aborts the others.
_GRACE_SECS, _COORDINATOR_GRACE_SECS = 10, 30
_POLL_SECS = 1
# The others need this long between their last message and their end.
_LAST_SECS = 3
# In milliseconds. A waiting process needs no limit: it ends with the others.
_FOREVER = 10**9
_END = "vitcls/end"
# Names in the store, and barriers, can be used only once, so each meeting gets a number.
_meetings = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the run's other processes, before any other use of jax.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: How many there are.
      process_id: Which one this is, from 0. All three unset: what SLURM, a TPU VM, Kubernetes or
        MPI says, see `jax.distributed.initialize`; nothing where none of them started this process.

    Raises:
      UserError: some are set and others are not, or a value is out of range.
      Unavailable: the port of process 0 is taken, or process 0 does not answer.
    """
    given = [coordinator_address, num_processes, process_id]
    if num_processes == 1 or any(value is not None for value in given):
        _check_flags(coordinator_address, num_processes, process_id)
    if num_processes == 1:
        return
    if process_id == 0:
        _check_port(coordinator_address)
    # This service would take the signals away from our own handlers and votes.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECS,
            shutdown_timeout_seconds=_SHUTDOWN_SECS,
        )
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            # No cluster started this process.
            return
        raise
    except jax.errors.JaxRuntimeError as error:
        raise _cannot_meet(
            coordinator_address or global_state.coordinator_address, error
        ) from error
    if global_state.num_processes > 1:
        # Process 0 logs for all.
        if global_state.process_id:
            log.setLevel(logging.WARNING)
        _watch_others()


def _check_flags(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if num_processes == 1 and address is None and process_id in (None, 0):
        return
    if None in (address, num_processes, process_id):
        raise UserError(
            f"--coordinator_address={address}, --num_processes={num_processes} and --process_id="
            f"{process_id} go together: set all three, or none to use what SLURM, a TPU VM or "
            "Kubernetes says."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator_address={address} must be HOST:PORT, of process 0.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}, one less than "
            f"--num_processes={num_processes}."
        )


def _check_port(address: str) -> None:
    """Raises `Unavailable` where process 0 could not listen; jax may end in a segfault there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            raise _cannot_meet(address, error) from error


def _cannot_meet(address: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"The processes of the run cannot meet at {address} (--coordinator_address): {error}. If "
        "process 0 says so, another program has the port, perhaps an earlier start of this run: "
        "end it, or name another port in all processes."
    )


def wait_for_all(what: str) -> None:
    """Returns once every process is here; `what` names the place."""
    if jax.process_count() > 1:
        # Every process meets the others in the same order, so the numbers agree.
        name = f"vitcls/{what}/{next(_meetings)}"
        global_state.client.wait_at_barrier(name, _FOREVER)


def in_any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    # The vote goes through the store. A collective of the devices could get between those of a step
    # that is still being computed, and could leave devices waiting for a process that ended.
    votes = f"vitcls/votes/{next(_meetings)}/"
    if flag:
        global_state.client.key_value_set(f"{votes}{jax.process_index()}", "")
    wait_for_all("vote")
    return bool(global_state.client.key_value_dir_get(votes))


def of_first(value: int) -> int:
    """Returns the value that process 0 has; all must ask."""
    if jax.process_count() == 1:
        return value
    name = f"vitcls/first/{next(_meetings)}"
    if jax.process_index() == 0:
        global_state.client.key_value_set(name, str(value))
    return int(global_state.client.blocking_key_value_get(name, _FOREVER))


def check_same(facts: dict[str, Any]) -> None:
    """Returns once every process has come here with the same facts.

    Args:
      facts: Name -> JSON value: the config, the data, and the like. The code is added.

    Raises:
      UserError: this process' facts differ from those of process 0; shows the differences.
    """
    if jax.process_count() == 1:
        return
    own = {"code of vitcls": _code_digest(), "jax": jax.__version__, **settings(), **facts}
    own = {"host": socket.gethostname(), **json.loads(json.dumps(own))}
    if jax.process_index() == 0:
        global_state.client.key_value_set("vitcls/facts", json.dumps(own))
    first = json.loads(global_state.client.blocking_key_value_get("vitcls/facts", _FOREVER))
    differences = [
        f"  {name}: {own.get(name)!r} here, {first.get(name)!r} there"
        for name in sorted((own.keys() | first.keys()) - {"host"})
        if own.get(name) != first.get(name)
    ]
    if differences:
        raise UserError(
            f"Process {jax.process_index()} on {own['host']} is not in the run that process 0 on "
            f"{first['host']} is in:\n" + "\n".join(differences) + "\nStart all processes with the "
            "same command, code and data."
        )
    wait_for_all("facts")


def _code_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_shared(folder: Path, *, patience_secs: float = 10) -> None:
    """Returns once every process sees the same `folder`, which process 0 has made.

    Raises:
      UserError: this process does not see a file that process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    probe = None
    if jax.process_index() == 0:
        probe = folder / f".shared-{secrets.token_hex(8)}"
        probe.touch()
        first = json.dumps([socket.gethostname(), probe.name])
        global_state.client.key_value_set("vitcls/probe", first)
    host, name = json.loads(global_state.client.blocking_key_value_get("vitcls/probe", _FOREVER))
    try:
        # Network file systems may be late. Attempts are counted, not seconds, because a suspended
        # process makes no attempts.
        looks_left = round(patience_secs / 0.1)
        while not (folder / name).exists():
            if not looks_left:
                raise UserError(
                    f"--workdir={folder} of process {jax.process_index()} on "
                    f"{socket.gethostname()} is not the folder that process 0 on {host} sees "
                    "under this name; put it on a file system that all machines share."
                )
            looks_left -= 1
            time.sleep(0.1)
        wait_for_all("probe")
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def late_maximum(mesh: Mesh) -> Callable[[int], int]:
    """Returns a function: number -> the largest number that any process gave at the call before.

    Every process must call it equally often; all get the same. With one process it is the identity.
    """
    if jax.process_count() == 1:
        return int
    # The result is one call late, so that no process waits for the devices.
    split = sharding.batch_sharding(mesh)
    maximum = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
    pending = maximum(_everywhere(0, split))

    def late(value: int) -> int:
        nonlocal pending
        before, pending = pending, maximum(_everywhere(value, split))
        return int(before)

    return late


def _everywhere(value: int, split: jax.sharding.NamedSharding) -> jax.Array:
    """This process' number, once for each of its devices, int32 (number of all devices,)."""
    local = np.full(len(split.addressable_devices), value, np.int32)
    return jax.make_array_from_process_local_data(split, local)


def leave(code: int, message: str) -> None:
    """Ends this process and all others, with the exit code of the first that ends.

    Returns if this process has not joined any others.

    Args:
      code: Exit code.
      message: Why, for the others; this process has said it already.
    """
    client = global_state.client
    if client is None or global_state.num_processes == 1:
        return
    # Python's own exit would not suffice: jax would wait for processes that wait for this one.
    # The coordinator may be gone or stuck, so a timer ends this process in any case.
    patience = _GRACE_SECS if global_state.process_id else _COORDINATOR_GRACE_SECS
    backstop = threading.Timer(patience, os._exit, [code])
    backstop.daemon = True
    backstop.start()
    own = {"process": global_state.process_id, "code": code, "message": message}
    # Setting the key fails if another process was first, or if the coordinator is gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_END, json.dumps(own))
    first = _first_end() or own
    if first["process"] != own["process"]:
        # Any process may be the one that holds up the others, so each shows its threads.
        if first["code"] == STALLED:
            faulthandler.dump_traceback(file=sys.__stderr__)
        print(
            f"Process {own['process']} ends because process {first['process']} did, with code "
            f"{first['code']}: {first['message']}",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_END}/{global_state.process_id}", "")
        # The coordinator lives in process 0, which therefore ends last.
        if global_state.process_id == 0:
            while len(client.key_value_dir_get(f"{_END}/")) < global_state.num_processes:
                time.sleep(0.1)
            # Without a coordinator jax aborts the processes that have not ended yet.
            time.sleep(_LAST_SECS)
    os._exit(first["code"])


def _watch_others() -> None:
    """Starts a thread that ends this process when another one said that it ends."""
    is_over = threading.Event()

    def watch():
        while not is_over.wait(_POLL_SECS):
            first = _first_end()
            if first is None:
                continue
            if first["process"] == global_state.process_id:
                # Another thread of this process is leaving already.
                return
            # This process may still end by itself.
            is_over.wait(_GRACE_SECS)
            leave(first["code"], first["message"])

    thread = threading.Thread(target=watch, name="watch-others", daemon=True)
    thread.start()

    def stop():
        is_over.set()
        thread.join()

    # This runs before jax leaves the coordinator, because jax registered its exit earlier.
    atexit.register(stop)


def _first_end() -> dict[str, Any] | None:
    """The message of the first process that ended; None: there is none, or no coordinator."""
    try:
        return json.loads(global_state.client.key_value_try_get(_END))
    except jax.errors.JaxRuntimeError:
        return None
