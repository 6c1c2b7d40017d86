"""Fine-tuning from start to end: set-up in order, then the loop, then the final evaluation."""

import concurrent.futures
import logging
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from vitcls.checkpoints import manager
from vitcls.checkpoints.state import eval_variables_at, restore_state, state_items
from vitcls.data.skipped import Skipped
from vitcls.errors import Interrupted
from vitcls.evaluate.patience import Patience
from vitcls.evaluate.run_evaluator import RunEvaluator
from vitcls.folders.workdir import Workdir
from vitcls.logs import wandb_sender
from vitcls.logs.parameters import memory_line, parameter_table
from vitcls.logs.profile import Profile
from vitcls.processes import distributed
from vitcls.processes.signals import StopRequest
from vitcls.processes.watchdog import Watchdog
from vitcls.provenance import continuing, manifest, run_logs
from vitcls.provenance.results import last_line, make_results
from vitcls.run import warnings
from vitcls.run.opened import open_run
from vitcls.run.program import Program
from vitcls.step import sharding
from vitcls.step.train_step import TrainState

log = logging.getLogger("vitcls")


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    *,
    devices: list[jax.Device] | None = None,
    num_profiled_steps: int = 0,
    start_time: float | None = None,
) -> dict[str, Any]:
    """Trains as `config` says, or continues a run; returns the content of `results.json`.

    Args:
      config: As `vitcls.config.default_config` lays it out.
      workdir: Folder of the run.
      devices: The devices to use; default all.
      num_profiled_steps: Number of steps to trace with the profiler, after the first.
      start_time: Start of the wall time that is reported, as `time.time()`; default now.

    Raises:
      UserError, StorageError, Interrupted, NonFiniteLoss: see `vitcls.errors`.
    """
    workdir, start_time = Workdir(workdir), start_time or time.time()
    # Mistakes first: a field, a data set or a checkpoint that does not fit stops here.
    workdir.check_own()
    wandb_sender.check(config.log.wandb_project)
    begun = continuing.read_begun(workdir)
    run = open_run(config, devices=devices, begun=begun)
    distributed.check_same(continuing.facts(run, is_continued=begun is not None))
    warnings.warn_of_traps(run)
    teacher = run.open_teacher()

    # Tracing the step takes seconds, in which a thread reads the weights.
    background = concurrent.futures.ThreadPoolExecutor(1)
    reading = background.submit(run.read_variables)
    program = run.make_program(teacher)
    config, lowered, variables = program.config, program.lower(), reading.result()
    total_steps, select = config.train.total_steps, config.eval.select_split

    # The workdir is finished, resumable, or new (without a saved step it counts as new).
    files = run.files
    if begun is not None:
        files = continuing.check_run(run, workdir, begun, program.teacher_sha256)
        if (results := workdir.finished_results(total_steps)) is not None:
            return _say_finished(results, workdir, config)
    checkpoints, start_step, saved = continuing.claim(run, workdir, program)
    manifest.write_start(workdir, run, program, is_new=begun is None)
    patience = Patience(config.eval.patience, saved)
    total_steps = start_step if patience.is_over else total_steps

    # The step is compiled in the thread, which ends then, while state and data get ready.
    compiling = background.submit(lowered.compile) if start_step < total_steps else None
    background.shutdown(wait=False)

    state = _first_state(program, checkpoints, start_step, variables)
    if start_step:
        manifest.note_continuation(workdir, run, step=start_step, files=files)
    # The host's copy would take memory for as long as the run lasts.
    del variables, reading

    # No process waits long for the others once its images are cached.
    run.fill_caches()
    distributed.wait_for_all("data")
    skipped = Skipped(workdir.skipped) if config.data.on_error == "skip" else None
    batches = sharding.prefetch(run.train_batches(start_step, skipped=skipped), run.mesh)
    profile = Profile(workdir.profile, min(num_profiled_steps, total_steps - start_step - 1))

    # The loop. `step` counts finished steps: what is evaluated and saved is the state after it.
    with (
        StopRequest(distributed.late_maximum(run.mesh), distributed.leave) as stop,
        Watchdog(**config.stall) as watchdog,
        checkpoints,
        run_logs.open_writer(workdir, config, saved, start_step, total_steps) as writer,
        run_logs.open_progress(config, start_step) as progress,
    ):
        metrics = run_logs.late_metrics(run, saved, writer, progress)
        evaluator = RunEvaluator(run, program, skipped, stop, watchdog, writer, patience)
        # A signal ended the evaluation that the last save was due for.
        if saved.lacks_score:
            score = evaluator.selection_score(start_step, state.eval_variables())
            checkpoints.add_score(start_step, score)
        watchdog.expect("compile")
        # The first call of `train_step` finds what was compiled for the same shapes.
        if compiling is not None:
            compiling.result()
        stop.is_all_saved = True
        for step in patience.until_over(range(start_step + 1, total_steps + 1)):
            profile.before(step - start_step, state)
            with progress.waiting():
                batch = next(batches)
            # A copy that nothing asked for would make the devices wait: it is an error.
            with jax.transfer_guard("disallow"):
                state, step_metrics = program.train_step(state, batch)
            stop.is_all_saved = False
            metrics.add(step, step_metrics)
            progress.step_done()
            # From the second step on, the first has been compiled and done everywhere.
            if step > start_step + 1:
                watchdog.expect("step")
            stop.poll()
            is_evaluated = bool(select) and _is_due(step, config.eval.every_steps, total_steps)
            is_saved = _is_due(step, config.checkpoint.every_steps, total_steps)
            if not (is_evaluated or is_saved or stop.name):
                continue
            metrics.flush()
            if skipped is not None:
                skipped.check_classes(run.train_split)
            with progress.paused():
                score = evaluator.due_score(step, state.eval_variables()) if is_evaluated else None
                watchdog.expect("save")
                saving = saved.after(
                    state, metrics.window, patience.counts(), seconds=time.time() - start_time,
                    speed=progress.images_per_second(), lacks_score=is_evaluated and score is None,
                )  # fmt: skip
                checkpoints.save(step, state_items(state), meta=saving.to_json(), score=score)
                watchdog.expect("step")
            if stop.name and (step < total_steps or saving.lacks_score):
                _stop(stop.name, step, total_steps, checkpoints, watchdog)
        total_steps = int(state.step)
        profile.before(total_steps - start_step + 1, state)
        watchdog.expect("save")
        checkpoints.wait()

        # The final evaluation, of the weights that select_split chose.
        selected_step = checkpoints.best_step() if select else total_steps
        variables = eval_variables_at(checkpoints, selected_step, state)
        summaries = evaluator.evaluate_all(total_steps, variables, workdir.predictions)
    results = make_results(
        run, program, saved, summaries, skipped, total_steps, selected_step,
        seconds=time.time() - start_time, speed=progress.images_per_second(),
    )  # fmt: skip
    return _finish(results, workdir, config)


def _say_finished(results: dict[str, Any], workdir: Workdir, config: ConfigDict) -> dict[str, Any]:
    if jax.process_index() == 0:
        how = (
            "raise train.total_steps or train.total_epochs to continue it (optim.restarts sets how "
            "the learning rate continues)."
        )
        if results.get("stopped_early"):
            how = f"eval.patience ended it after step {results['step']}."
        log.info("This run is finished; %s", how)
        print(last_line(results, workdir.path, splits=config.data.eval_splits))
    return results


def _first_state(
    program: Program, checkpoints: manager.Checkpoints, start_step: int, variables: Any
) -> TrainState:
    """Returns the state before the first step of this process, on the devices.

    The weights come from the workdir, else from the pretrained checkpoint, else they are random.
    """
    if start_step:
        state = restore_state(checkpoints, start_step, program.placed_state())
        state = program.with_teacher(state)
        log.info("Continuing after step %d of %d.", start_step, program.config.train.total_steps)
    else:
        state = program.first_state(variables)
    if jax.process_index() == 0:
        log.info("%s", parameter_table(state.params, state.frozen, state.batch_stats))
        log.info("%s", memory_line(state))
        log.info("%s", program.passes_line())
    return state


def _is_due(step: int, every_steps: int, total_steps: int) -> bool:
    return step == total_steps or bool(every_steps and step % every_steps == 0)


def _stop(
    signal: str, step: int, total_steps: int, checkpoints: manager.Checkpoints, watchdog: Watchdog
) -> NoReturn:
    watchdog.expect("save")
    checkpoints.wait()
    # The first process that ends would end the others.
    distributed.wait_for_all("stopped")
    raise Interrupted(
        f"{signal}: saved after step {step} of {total_steps}; run the same command again to "
        "continue."
    )


def _finish(results: dict[str, Any], workdir: Workdir, config: ConfigDict) -> dict[str, Any]:
    if jax.process_index() == 0:
        from vitcls.decision import kept  # imports scipy, which the start should not wait for

        kept.write_at_end(workdir, config, results)
        workdir.finish(results)
        print(last_line(results, workdir.path, splits=config.data.eval_splits))
    # The coordinator waits only a short while for the others.
    distributed.wait_for_all("results")
    return results
