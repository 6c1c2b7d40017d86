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
from vitcls.checkpoints import folders, manager
from vitcls.checkpoints.state import restore_eval_variables, restore_state, state_items
from vitcls.config.checks import check_config
from vitcls.config.saved import check_same_run
from vitcls.costs import footprint
from vitcls.data import loader
from vitcls.data.skipped import Skipped
from vitcls.errors import Interrupted, NonFiniteLoss
from vitcls.evaluate.exact import check_logits, evaluate
from vitcls.files import expand, make_folder, write_json
from vitcls.folders import ownership
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
from vitcls.step.metrics import select_score
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
    workdir, start_time = expand(workdir), start_time or time.time()

    # Mistakes first: a field, a data set or a checkpoint that does not fit stops here.
    check_settings()
    check_config(config)
    ownership.check_run(workdir)
    optim.check_args(config.optim.name, dict(config.optim.args))
    wandb_sender.check(config.log.wandb_project)
    begun = workdir if folders.has_steps(workdir / "checkpoints") else None
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
    teacher = None
    if config.loss.teacher:
        teacher = open_teacher(config.loss.teacher, processor, dtype=config.model.dtype)
    background = concurrent.futures.ThreadPoolExecutor(1)
    reading = files and background.submit(
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
    if config.train.micro_batch == 0:
        config.train.micro_batch = program.pass_size  # what was chosen; a continued run keeps it
    lowered = program.lower()  # traced while the weights are read
    variables = reading and reading.result()

    # The workdir: finished, begun with this config and data, or new, as is what never saved a step.
    is_main = jax.process_index() == 0
    meta = {"seconds": 0.0, "images_per_second": None, "window": []}
    moved = {}
    if begun:
        moved = continuing.find_moved(config, begun, train_split, teacher)
        check_same_run(config, workdir / "config.json", moved=moved)
        known = records.recorded_fingerprints(workdir)
        results = records.read_results(workdir)
        is_finished = results is not None and results.get("step") == config.train.total_steps
        if is_finished:
            splits = results["splits"].items()
            known |= {name: one["fingerprint"] for name, one in splits if "fingerprint" in one}
        warn_of_changed_splits(known, eval_splits, select=config.eval.select_split)
        if is_finished:
            if is_main:
                log.info(
                    "This run is finished; raise train.total_steps or train.total_epochs to "
                    "continue it (optim.restarts says how the learning rate goes on)."
                )
                print(records.last_line(results, workdir, splits=config.data.eval_splits))
            return results
    if is_main:
        make_folder(workdir)
    distributed.check_shared(workdir)
    checkpoints = manager.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    start_step = checkpoints.latest_step() or 0
    if start_step:
        meta = checkpoints.meta(start_step)
        if is_main:
            path = workdir / "config.json"
            for change in warnings.rate_changes(config, path, step=start_step):
                log.warning("%s", change)
        check_same_data(meta["data"], train_split)
        continuing.check_same_teacher(meta.get("teacher"), teacher)
        if start_step < config.train.total_steps:
            continuing.check_same_passes(meta.get("num_passes", 1), program, config)
    used = [train_split, *eval_splits.values()]
    if is_main:
        if not begun:  # the manifest first: by it the folder is known to be a run's
            manifest = records.manifest(mesh, used, files, teacher=teacher and teacher.sha256)
            write_json(workdir / "manifest.json", manifest)
            pretrained.write_config(workdir / "model", model_config, processor)
            (workdir / "skipped.jsonl").unlink(missing_ok=True)
        write_json(workdir / "config.json", config.to_dict())
        seen.write(
            workdir, config.data.source, train_split, eval_splits, division=config.data.division
        )

    is_trained = start_step < config.train.total_steps
    compiling = is_trained and background.submit(lowered.compile)  # while data get ready
    background.shutdown(wait=False)  # it ends when these two are done

    # Where the weights come from: 1. the workdir, 2. the pretrained checkpoint, 3. random.
    if start_step:
        state = restore_state(
            checkpoints, start_step, program.state_shapes, program.state_shardings
        )
        state = program.with_teacher(state)
        if is_main:
            records.note_continuation(
                workdir / "manifest.json", mesh, used, source=config.model.pretrained,
                step=start_step, files=moved.get("model.pretrained"),
            )  # fmt: skip
        log.info("Continuing after step %d of %d.", start_step, config.train.total_steps)
    else:
        state = program.first_state(variables)
    del variables, reading  # the host's copy
    if is_main:
        log.info("%s", parameter_table(state.params, state.frozen, state.batch_stats))
        log.info("%s", memory_line(state))
        log.info("%s", program.passes_line())

    # Data: a cache on disk is filled first; then local uint8 batches, one ahead on the devices.
    for split in used:
        split.fill_cache(num_threads=config.data.num_threads)
    distributed.wait_for_all("data")  # from here on nobody waits long for the others
    skipped = Skipped(workdir / "skipped.jsonl") if config.data.on_error == "skip" else None
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

    def evaluate_split(name: str, variables: Any, **kwargs) -> tuple[dict, dict]:
        split_batches = loader.eval_batches(
            eval_splits[name],
            global_batch_size=config.eval.batch_size,
            transform=processor.pixels,
            **loading,
        )
        watchdog.expect("compile")
        return evaluate(
            program.eval_step, variables, split_batches,
            mesh=mesh, name=name, num_examples=len(eval_splits[name]), train_counts=class_counts,
            after_batch=after_eval_batch, **kwargs,
        )  # fmt: skip

    def after_eval_batch() -> None:
        watchdog.expect("eval")
        if stop.poll():
            raise Interrupted(f"{stop.name}: an evaluation stopped; run the same command again.")

    def selection_score(step: int) -> float:
        summary, _ = evaluate_split(select, state.eval_variables())
        writer.write(step, {f"{select}/{name}": x for name, x in summary.items()})
        _log_summary(f"step {step}: {select}", summary)
        return select_score(summary, config.eval.select_metric)

    def seconds() -> float:
        return meta["seconds"] + time.time() - start_time

    # The loop. `step` counts finished steps: what is evaluated and saved is the state after it.
    total_steps, select = config.train.total_steps, config.eval.select_split
    profile = functools.partial(
        _profile,
        num_steps=min(num_profiled_steps, total_steps - start_step - 1),
        directory=workdir / "profile",
    )
    with (
        StopRequest(distributed.late_maximum(mesh), distributed.leave) as stop,
        Watchdog(**config.stall) as watchdog,
        checkpoints,
        MetricWriter(
            workdir,
            start_step=start_step,
            again=[
                *(config.data.eval_splits if start_step == total_steps else ()),
                *([select] if meta.get("lacks_score") else ()),
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
            window=meta["window"],
            max_nonfinite=config.train.max_nonfinite,
            ids=functools.partial(
                loader.train_ids,
                train_split,
                global_batch_size=config.train.global_batch_size,
                seed=config.train.seed,
                sampling=config.data.sampling,
            ),
        )
        if meta.get("lacks_score"):  # a signal ended the evaluation that the last save was due for
            checkpoints.add_score(start_step, selection_score(start_step))
        watchdog.expect("compile")
        if compiling:
            compiling.result()  # what `train_step` is called with was lowered: it finds the result
        stop.is_all_saved = True
        for step in range(start_step + 1, total_steps + 1):
            profile(step - start_step - 1, state)
            with progress.waiting():
                batch = next(batches)
            with jax.transfer_guard("disallow"):  # nothing crosses to the devices unasked
                state, step_metrics = program.train_step(state, batch)
            stop.is_all_saved = False
            metrics.add(step, step_metrics)
            progress.step_done()
            if step > start_step + 1:  # the first has been compiled and done everywhere
                watchdog.expect("step")
            stop.poll()
            is_evaluated = select and _is_due(step, config.eval.every_steps, total_steps)
            is_saved = _is_due(step, config.checkpoint.every_steps, total_steps)
            if not (is_evaluated or is_saved or stop.name):
                continue
            metrics.flush()
            if skipped is not None:
                skipped.check_classes(train_split)
            with progress.paused():
                score = None
                if is_evaluated and not stop.name:
                    with contextlib.suppress(Interrupted):  # saved first: there is more to lose
                        score = selection_score(step)
                watchdog.expect("save")
                meta_now = {
                    "lacks_score": bool(is_evaluated) and score is None,
                    "data": train_split.fingerprint,
                    "teacher": teacher and teacher.sha256,
                    "num_passes": program.num_passes,
                    "seconds": seconds(),
                    "images_per_second": progress.images_per_second(),
                    "window": metrics.window,
                    "skips": jax.tree.map(int, state.skips),
                    "num_empty": int(state.num_empty),
                }
                checkpoints.save(step, state_items(state), meta=meta_now, score=score)
                watchdog.expect("step")
            if stop.name and (step < total_steps or meta_now["lacks_score"]):
                watchdog.expect("save")
                checkpoints.wait()
                distributed.wait_for_all("stopped")  # the first that ends would end the others
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
        summaries = {}
        for name in dict.fromkeys([*config.data.eval_splits, *filter(None, [select])]):
            summaries[name], predictions = evaluate_split(name, variables, keep_predictions=True)
            check_logits(predictions, eval_splits[name], error=NonFiniteLoss)
            if is_main:
                ids = [eval_splits[name].id(i) for i in predictions.pop("index").tolist()]
                records.save_predictions(
                    workdir / f"predictions/{name}.npz", ids=ids, **predictions
                )
            if name != select:
                writer.write(total_steps, {f"{name}/{k}": x for k, x in summaries[name].items()})
    if skipped is not None:
        skipped.log_counts(used)
    results = {
        "step": total_steps,
        "seconds": seconds(),
        "images_per_second": progress.images_per_second() or meta["images_per_second"],
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
        write_json(workdir / "results.json", results)
        print(records.last_line(results, workdir, splits=config.data.eval_splits))
    distributed.wait_for_all("results")  # the coordinator waits a short while only for the others
    return results


def _is_due(step: int, every_steps: int, total_steps: int) -> bool:
    return step == total_steps or bool(every_steps and step % every_steps == 0)


def _log_summary(what: str, summary: dict[str, float]) -> None:
    log.info(
        "%s accuracy %.4f, loss %.4f (%s)",
        what, summary["accuracy"], summary["loss"], records.count_images(summary),
    )  # fmt: skip


def _profile(index: int, state: TrainState, *, num_steps: int, directory: Path) -> None:
    """Traces `num_steps` steps before the one with this index; the first, which compiles, is 0."""
    if num_steps > 0 and index == 1:
        jax.block_until_ready(state)
        jax.profiler.start_trace(directory)
    if num_steps > 0 and index == 1 + num_steps:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        log.info("Traced %d steps into %s.", num_steps, directory)
