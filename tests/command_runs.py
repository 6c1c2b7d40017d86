"""Runs of the training command in processes of their own, which some fault may strike.

As a program, `command_runs.py FAULT FLAGS...` is `python -m vitcls.main FLAGS...` in which FAULT,
`PHASE:ACTION:PROCESS`, happens once: when that process comes to that phase. Every process leaves
the sample ids of its training batches in WORKDIR.ids-PROCESS.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS, EVAL_STEP, FAULT_STEP = 8, 4, 3
CONFIG = f"""
from vitcls.config import default_config

def get_config():
    config = default_config()
    config.data.update(source="digits", image_size=(8, 8), num_threads=2)
    config.model.update(arch="vit_mu4", dropout=0.1)
    config.augment.mixup = 0.2  # of neighbours in a batch
    config.optim.update(lr=1e-3, ema_decay=0.9)
    config.train.update(total_steps={STEPS}, global_batch_size=48)
    config.eval.update(every_steps={EVAL_STEP}, batch_size=48)
    config.log.every_steps = 1
    return config
"""


class Run:
    """One start of the command, in one process or several."""

    def __init__(
        self,
        workdir: Path,
        *flags: str,
        num_processes: int = 1,
        num_devices: int = 1,
        fault: str = "",
        flags_of: dict[int, list[str]] | None = None,
    ):
        """Starts it.

        Args:
          workdir: Its folder.
          flags: Further ones.
          num_processes: How many; more than one are told of each other.
          num_devices: Of each process.
          fault: See above; "": none.
          flags_of: Process -> flags of that process only, which come last.
        """
        config = workdir.with_name("config.py")
        config.write_text(CONFIG)
        command = [sys.executable, __file__, fault, f"--config={config}", f"--workdir={workdir}"]
        if num_processes > 1:
            flags += (f"--coordinator_address={free_address()}",)
            flags += (f"--num_processes={num_processes}",)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        }
        self.processes = []
        for index in range(num_processes):
            own = [f"--process_id={index}"] if num_processes > 1 else []
            own += (flags_of or {}).get(index, [])
            self.processes.append(
                subprocess.Popen(
                    [*command, *flags, *own],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def end(self, timeout: float = 900) -> tuple[list[int], list[str]]:
        """Waits for all; returns their exit codes and outputs. Nothing may be left of them.

        `seconds_after_fault` is then how long it took from the fault to the end of the last one.
        """
        outputs = [""] * len(self.processes)

        def read(index: int) -> None:
            outputs[index] = self.processes[index].communicate()[0]

        threads = [threading.Thread(target=read, args=[i]) for i in range(len(outputs))]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        struck = re.search(r"^FAULT (\S+)$", "\n".join(outputs), re.MULTILINE)
        self.seconds_after_fault = time.time() - float(struck[1]) if struck else None
        hanging = [process for process in self.processes if process.poll() is None]
        for process in hanging:
            os.killpg(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert not hanging, outputs
        for process in self.processes:
            assert not _group_exists(process.pid), "a process was left behind"
        return [process.returncode for process in self.processes], outputs


def free_address() -> str:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _group_exists(number: int) -> bool:
    for _ in range(50):  # what was killed needs a moment
        try:
            os.killpg(number, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def finished(workdir: Path, *flags: str, **kwargs: Any) -> None:
    """Runs the command to its end, which must be a good one."""
    codes, outputs = Run(workdir, *flags, **kwargs).end()
    assert codes == [0] * len(codes), "\n".join(outputs)


def metric_lines(workdir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds, but for times."""
    measured = {"time", "train/images_per_second", "train/waiting"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in measured} for line in lines]


def sample_ids(workdir: Path) -> dict[int, list[int]]:
    """Step -> which images its global batch had, in its order: the same in all starts of a run."""
    rows = {}  # (step, number of processes) -> first row -> ids
    for path in workdir.parent.glob(f"{workdir.name}.ids-*"):
        for line in path.read_text().splitlines():
            step, first_row, ids = json.loads(line)
            rows.setdefault((step, path.name.split("-")[-1]), {})[first_row] = ids
    batches = {}
    for (step, _), parts in rows.items():
        batch = [index for row in sorted(parts) for index in parts[row]]
        assert batches.setdefault(step, batch) == batch
    return batches


def final_arrays(workdir: Path) -> dict[str, Any]:
    """All that the checkpoint of the last step holds."""
    import jax

    from vitcls.checkpoints.manager import Checkpoints

    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    saved = checkpoints._manager.item_metadata(STEPS)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever they were
    target = {
        name: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            saved[name].tree,
        )
        for name in ("params", "opt_state", "ema")
    }
    return checkpoints.restore(STEPS, target)


def assert_same_run(whole: Path, parts: Path) -> None:
    """That a run in several starts is, bit for bit, the one that nothing befell."""
    import jax
    import numpy as np

    one, other = final_arrays(whole), final_arrays(parts)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert metric_lines(parts) == metric_lines(whole)
    assert sample_ids(parts) == sample_ids(whole)
    results = [json.loads((run / "results.json").read_text()) for run in (whole, parts)]
    for name in ("selected_step", "splits"):
        assert results[0][name] == results[1][name]


def assert_same_samples_and_losses(one: Path, other: Path) -> None:
    """That two runs saw the same images, and computed the same up to the last bits."""
    import pytest

    assert sample_ids(one) == sample_ids(other)
    lines = [metric_lines(run) for run in (one, other)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for first, second in zip(*lines, strict=True):
        for name in first:
            if name.endswith("/loss") or name == "step":
                assert first[name] == pytest.approx(second[name], rel=2e-6), name


def _record_samples(workdir: str) -> None:
    import jax

    from vitcls.data import loader

    train_batches = loader.train_batches

    def recorded(split, *, start_step, **kwargs):
        index, count = jax.process_index(), jax.process_count()
        first_row = index * kwargs["global_batch_size"] // count
        with open(f"{workdir}.ids-{index}-of-{count}", "a") as file:
            batches = train_batches(split, start_step=start_step, **kwargs)
            for step, batch in enumerate(batches, start_step):
                file.write(json.dumps([step, first_row, batch["index"].tolist()]) + "\n")
                file.flush()
                yield batch

    loader.train_batches = recorded


def _prepare_fault(phase: str, action: str, process: int) -> None:
    """Arranges that `action`, a signal or "hang" or "raise", happens once."""
    import jax

    from vitcls.checkpoints import manager
    from vitcls.data import cache
    from vitcls.evaluate import run_evaluator
    from vitcls.logs.writers import LateMetrics
    from vitcls.run import opened
    from vitcls.step import metrics

    is_done = False

    def act() -> None:
        nonlocal is_done
        if is_done or jax.process_index() != process:
            return
        is_done = True
        print(f"FAULT {time.time()}", flush=True)
        if action == "hang":
            while True:
                time.sleep(1)
        if action == "raise":
            raise RuntimeError("a bug")
        if action == "SIGINT_TWICE":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        os.kill(os.getpid(), signal.Signals[action.removesuffix("_TWICE")])

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *a, **k: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if when(*args, **kwargs):
                act()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    if phase == "setup":
        before(opened, "open_model")
    elif phase == "cache":
        before(cache.DiskCache, "_write_shard")
    elif phase == "compile":
        make = opened.make_program

        def make_program(*args, **kwargs):
            program = make(*args, **kwargs)
            step = program.train_step

            def slow_to_compile(*inputs):
                threading.Timer(0.3, act).start()
                return step(*inputs)

            object.__setattr__(program, "train_step", slow_to_compile)
            return program

        opened.make_program = make_program
    elif phase == "train":
        before(LateMetrics, "add", lambda self, step, _: step >= FAULT_STEP)
    elif phase == "eval":
        before(metrics, "add_sums", lambda total, _: total is not None)
    elif phase == "save":
        save = manager.Checkpoints.save

        def save_and_act(*args, **kwargs):
            save(*args, **kwargs)
            act()  # while the files are being written, behind

        manager.Checkpoints.save = save_and_act
    elif phase == "final":
        before(run_evaluator, "evaluate", lambda *args, name, **kwargs: name == "test")


def _main() -> None:
    fault = sys.argv.pop(1)
    from vitcls import cli, main

    def faulty() -> None:
        _record_samples(main._WORKDIR.value)
        if fault:
            phase, action, process = fault.split(":")
            _prepare_fault(phase, action, int(process))
        main.main()

    cli.run(faulty)


if __name__ == "__main__":
    _main()
