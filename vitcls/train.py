"""Fine-tuning from start to end: set-up in order, then the loop, then the final evaluation."""

import concurrent.futures
import contextlib
import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.checkpoints import manager
from vitcls.checkpoints.saved import Saved
from vitcls.checkpoints.state import restore_eval_variables, restore_state, state_items
from vitcls.checkpoints.workdir import Workdir
from vitcls.config.checks import check_config
from vitcls.config.saved import check_same_run
from vitcls.costs import footprint
from vitcls.data import loader
from vitcls.data.skipped import Skipped
from vitcls.errors import Interrupted
from vitcls.evaluate.run_evaluator import RunEvaluator
from vitcls.logs import wandb_sender
from vitcls.logs.parameters import memory_line, parameter_table
from vitcls.logs.progress import Progress
from vitcls.logs.writers import LateMetrics, MetricWriter
from vitcls.processes import distributed
from vitcls.processes.signals import StopRequest
from vitcls.processes.watchdog import Watchdog
from vitcls.run import continuing, network, records, resolve, seen, warnings
from vitcls.run.program import make_program
from vitcls.run.splits import check_same_data, keep_division, open_splits, warn_of_changed_splits
from vitcls.run.teacher import open_teacher
from vitcls.step import optim, sharding
from vitcls.step.devices import check_settings
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
    """Trains as `config` says, or continues what `workdir` holds, and evaluates.

    Args:
      config: As `vitcls.config.default_config` lays it out.
      workdir: Folder of the run.
      devices: The devices to use; default all.
      num_profiled_steps: Number of steps to trace with the profiler, after the first.
      start_time: When the wall time that is reported began, as `time.time()`; default now.

    Returns:
      What `results.json` holds.

    Raises:
      UserError, StorageError, Interrupted, NonFiniteLoss: see `vitcls.errors`.
    """
    workdir, start_time = Workdir(workdir), start_time or time.time()

    # Mistakes first: a field, a data set or a checkpoint that does not fit stops here.
    check_settings()
    check_config(config)
    workdir.check_own()
    optim.check_args(config.optim.name, dict(config.optim.args))
    wandb_sender.check(config.log.wandb_project)
    begun = workdir.begun()
    config = keep_division(config, begun)
    train_split, eval_splits = open_splits(config, begun=begun is not None)
    files, model_config, processor = network.open_model(
        config, train_split.class_names, begun=begun
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)
    config = resolve.resolve(
        config, num_train=len(train_split), image_size=processor.size, num_devices=mesh.size,
        begun=begun,
    )  # fmt: skip
    distributed.check_same(continuing.facts(config, train_split, eval_splits, begun=begun))
    num_select = len(eval_splits[config.eval.select_split]) if config.eval.select_split else 0
    for trap in warnings.traps(config, model_config, num_select=num_select):
        log.warning("%s", trap)
    class_counts = train_split.class_counts()
    teacher, teacher_sha256 = None, None
    if config.loss.teacher:
        teacher = open_teacher(config.loss.teacher, processor, dtype=config.model.dtype)
        teacher_sha256 = teacher.sha256
    background = concurrent.futures.ThreadPoolExecutor(1)
    reading = None
    if files is not None:
        reading = background.submit(
            pretrained.read_variables, files, model_config, new_head=config.model.head == "new"
        )
    program = make_program(
        config,
        model_config,
        processor,
        mesh,
        class_names=train_split.class_names,
        class_counts=class_counts,
        teacher=teacher,
    )
    # The choice is kept in the config, so that a continued run makes the same passes.
    if config.train.micro_batch == 0:
        config.train.micro_batch = program.pass_size
    # Tracing takes seconds, in which the weights are read.
    lowered = program.lower()
    variables = None if reading is None else reading.result()

    # The workdir is finished, resumable, or new (without a saved step it counts as new).
    is_main = jax.process_index() == 0
    saved = Saved()
    moved = {}
    if begun:
        moved = continuing.find_moved(config, begun, train_split, teacher)
        check_same_run(config, workdir.config, moved=moved)
        known = records.recorded_fingerprints(workdir.path)
        results = workdir.finished_results(config.train.total_steps)
        if results is not None:
            splits = results["splits"].items()
            known |= {name: one["fingerprint"] for name, one in splits if "fingerprint" in one}
        warn_of_changed_splits(known, eval_splits, select=config.eval.select_split)
        if results is not None:
            if is_main:
                log.info(
                    "This run is finished; raise train.total_steps or train.total_epochs to "
                    "continue it (optim.restarts says how the learning rate goes on)."
                )
                print(records.last_line(results, workdir.path, splits=config.data.eval_splits))
            return results
    workdir.claim()
    checkpoints = manager.Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep)
    start_step = checkpoints.latest_step() or 0
    if start_step:
        saved = Saved.from_json(checkpoints.meta(start_step))
        if is_main:
            for change in warnings.rate_changes(config, workdir.config, step=start_step):
                log.warning("%s", change)
        check_same_data(saved.data, train_split)
        continuing.check_same_teacher(saved.teacher, teacher)
        if start_step < config.train.total_steps:
            continuing.check_same_passes(saved.num_passes, program, config)
    used = [train_split, *eval_splits.values()]
    if is_main:
        if not begun:
            workdir.begin(records.manifest(mesh, used, files, teacher=teacher_sha256))
            pretrained.write_config(workdir.model, model_config, processor)
            workdir.skipped.unlink(missing_ok=True)
        workdir.describe(config.to_dict())
        seen.write(
            workdir.path,
            config.data.source,
            train_split,
            eval_splits,
            division=config.data.division,
        )

    # The step is compiled while the state and the data get ready.
    compiling = None
    if start_step < config.train.total_steps:
        compiling = background.submit(lowered.compile)
    # The thread ends once both of its tasks are done.
    background.shutdown(wait=False)

    # Where the weights come from: 1. the workdir, 2. the pretrained checkpoint, 3. random.
    if start_step:
        state = restore_state(
            checkpoints, start_step, program.state_shapes, program.state_shardings
        )
        state = program.with_teacher(state)
        if is_main:
            records.note_continuation(
                workdir.manifest, mesh, used, source=config.model.pretrained,
                step=start_step, files=moved.get("model.pretrained"),
            )  # fmt: skip
        log.info("Continuing after step %d of %d.", start_step, config.train.total_steps)
    else:
        state = program.first_state(variables)
    # The host's copy would take memory for as long as the run lasts.
    del variables, reading
    if is_main:
        log.info("%s", parameter_table(state.params, state.frozen, state.batch_stats))
        log.info("%s", memory_line(state))
        log.info("%s", program.passes_line())

    # Data: a cache on disk is filled first; then local uint8 batches, one ahead on the devices.
    for split in used:
        split.fill_cache(num_threads=config.data.num_threads)
    # From here on no process waits long for the others.
    distributed.wait_for_all("data")
    skipped = Skipped(workdir.skipped) if config.data.on_error == "skip" else None
    loading = dict(
        skipped=skipped,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = sharding.prefetch(
        loader.train_batches(
            train_split,
            global_batch_size=config.train.global_batch_size,
            start_step=start_step,
            total_steps=config.train.total_steps,
            seed=config.train.seed,
            sampling=config.data.sampling,
            transform=network.train_transform(config, processor),
            **loading,
        ),
        mesh,
    )

    # The loop. `step` counts finished steps: what is evaluated and saved is the state after it.
    total_steps, select = config.train.total_steps, config.eval.select_split
    profile = functools.partial(
        _profile,
        num_steps=min(num_profiled_steps, total_steps - start_step - 1),
        directory=workdir.profile,
    )
    with (
        StopRequest(distributed.late_maximum(mesh), distributed.leave) as stop,
        Watchdog(**config.stall) as watchdog,
        checkpoints,
        MetricWriter(
            workdir.path,
            start_step=start_step,
            again=[
                *(config.data.eval_splits if start_step == total_steps else ()),
                *([select] if saved.lacks_score else ()),
            ],
            is_main=is_main,
            wandb_project=config.log.wandb_project,
            config=config.to_dict(),
        ) as writer,
        Progress(
            start_step, total_steps, global_batch_size=config.train.global_batch_size
        ) as progress,
    ):
        metrics = LateMetrics(
            writer,
            progress,
            every_steps=config.log.every_steps,
            window=saved.window,
            max_nonfinite=config.train.max_nonfinite,
            ids=functools.partial(
                loader.train_ids,
                train_split,
                global_batch_size=config.train.global_batch_size,
                seed=config.train.seed,
                sampling=config.data.sampling,
            ),
        )
        evaluator = RunEvaluator(
            config, program, processor, eval_splits,
            class_counts=class_counts, loading=loading,
            stop=stop, watchdog=watchdog, writer=writer,
        )  # fmt: skip
        # A signal ended the evaluation that the last save was due for.
        if saved.lacks_score:
            score = evaluator.selection_score(start_step, state.eval_variables())
            checkpoints.add_score(start_step, score)
        watchdog.expect("compile")
        # What `train_step` is called with was lowered: it finds the result.
        if compiling is not None:
            compiling.result()
        stop.is_all_saved = True
        for step in range(start_step + 1, total_steps + 1):
            profile(step - start_step - 1, state)
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
                skipped.check_classes(train_split)
            with progress.paused():
                score = None
                if is_evaluated and not stop.name:
                    # A run that is stopped saves first: there is more to lose than a score.
                    with contextlib.suppress(Interrupted):
                        score = evaluator.selection_score(step, state.eval_variables())
                watchdog.expect("save")
                saving = Saved(
                    lacks_score=is_evaluated and score is None,
                    data=train_split.fingerprint,
                    teacher=teacher_sha256,
                    num_passes=program.num_passes,
                    seconds=saved.seconds + time.time() - start_time,
                    images_per_second=progress.images_per_second(),
                    window=metrics.window,
                    skips=jax.tree.map(int, state.skips),
                    num_empty=int(state.num_empty),
                )
                checkpoints.save(step, state_items(state), meta=saving.to_json(), score=score)
                watchdog.expect("step")
            if stop.name and (step < total_steps or saving.lacks_score):
                watchdog.expect("save")
                checkpoints.wait()
                # The first process that ends would end the others.
                distributed.wait_for_all("stopped")
                raise Interrupted(
                    f"{stop.name}: saved after step {step} of {total_steps}; "
                    "run the same command again to continue."
                )
        profile(total_steps - start_step, state)
        watchdog.expect("save")
        checkpoints.wait()

        # The final evaluation, of the weights that select_split chose.
        selected_step = checkpoints.best_step() if select else total_steps
        variables = state.eval_variables()
        if selected_step != total_steps:
            variables = restore_eval_variables(checkpoints, selected_step, state)
        summaries = evaluator.evaluate_all(total_steps, variables, workdir.predictions)
    if skipped is not None:
        skipped.log_counts(used)
    results = {
        "step": total_steps,
        "seconds": saved.seconds + time.time() - start_time,
        "images_per_second": progress.images_per_second() or saved.images_per_second,
        "selected_step": selected_step,
        "train": {"num_skipped": skipped.count(train_split.name) if skipped else 0},
        "splits": {
            name: summary | {"fingerprint": eval_splits[name].fingerprint}
            for name, summary in summaries.items()
        },
    }
    if speed := progress.images_per_second():
        results["plan"] = footprint.planned_and_measured(
            program, dtype=config.model.dtype, images_per_second=speed
        )
    if is_main:
        workdir.finish(results)
        print(records.last_line(results, workdir.path, splits=config.data.eval_splits))
    # The coordinator waits only a short while for the others.
    distributed.wait_for_all("results")
    return results


def _is_due(step: int, every_steps: int, total_steps: int) -> bool:
    return step == total_steps or bool(every_steps and step % every_steps == 0)


def _profile(index: int, state: TrainState, *, num_steps: int, directory: Path) -> None:
    """Traces `num_steps` steps before the one with this index; the first, which compiles, is 0."""
    if num_steps > 0 and index == 1:
        jax.block_until_ready(state)
        jax.profiler.start_trace(directory)
    if num_steps > 0 and index == 1 + num_steps:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        log.info("Traced %d steps into %s.", num_steps, directory)
