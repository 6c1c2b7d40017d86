"""Plans a run: compiles its steps for devices that need not exist, and counts memory and time.

K classes.
"""

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.costs import chips, footprint
from vitcls.costs.fitting import check_passes_are_free, trains_statistics
from vitcls.data.sources import builders
from vitcls.errors import UserError
from vitcls.files import read_or_set_aside, write_json
from vitcls.plan.choices import Choice, first_fitting
from vitcls.plan.slices import Slice
from vitcls.recipes import ARCHS
from vitcls.run.opened import open_run
from vitcls.run.passes import pass_sizes
from vitcls.run.program import Program, with_fields
from vitcls.step import sharding

log = logging.getLogger("vitcls")

# Raised when `footprint` counts otherwise: figures that were kept before are then left.
_COUNTING = 2


class Plans:
    """The programs of one config for one slice; each combination is compiled once."""

    def __init__(
        self, config: ConfigDict, where: Slice, *, arch: str, num_classes: int, num_images: int
    ):
        """Opens data and checkpoint, or uses the arguments in their place.

        Args:
          config: The run's.
          where: The devices.
          arch: Network to plan for in place of the checkpoint; "": `model.pretrained` is read.
          num_classes: Number of classes of data that are not here; 0: the data are here.
          num_images: Number of training images of such data; 0: `train.total_steps` is set.

        Raises:
          UserError: neither a field nor an argument tells what is needed.
        """
        self.where = where
        stand_in = _stand_in(config, num_classes, num_images)
        config = _with_known_network(config, arch)
        self._run = open_run(config, devices=where.devices, train_split=stand_in)
        self.config = self._run.config
        # The names in a dictionary of weights are not those of the stand-in.
        if self.config.loss.class_weights.startswith("{") and num_classes:
            self.config.loss.class_weights = "balanced"
        self._teacher = self._run.open_teacher()
        self.program = functools.cache(self._program)
        self.analysis = functools.cache(self._analysis)
        whole = pass_sizes(self.config, len(where.devices))[0]
        asked = Choice(self.config.mesh.fsdp, self.config.model.remat, whole)
        if self.config.train.micro_batch == 0:
            check_passes_are_free(self.program(asked))
        size = self.config.train.micro_batch or whole
        asked = dataclasses.replace(asked, pass_size=size)
        self.asked = dataclasses.replace(asked, pass_size=self.program(asked).pass_size)

    def _program(self, choice: Choice) -> Program:
        mesh = sharding.make_mesh(-1, choice.fsdp, devices=self.where.devices)
        config = with_fields(self.config, choice.fields())
        return dataclasses.replace(self._run, config=config, mesh=mesh).make_program(self._teacher)

    def _analysis(self, choice: Choice) -> dict[str, Any]:
        """Returns `footprint.analyse` of the training step."""
        log.info("Compiling the training step: %s.", choice.line())
        program = self.program(choice)
        return _analyse(program.lower(), program, self.where)

    def eval_analysis(self, choice: Choice, batch_size: int) -> dict[str, Any]:
        """Returns `footprint.analyse` of the evaluation step."""
        log.info("Compiling the evaluation step: batches of %d images.", batch_size)
        program = self.program(choice)
        return _analyse(program.lower_eval(batch_size), program, self.where, num_passes=1)

    def needed(self, choice: Choice) -> float:
        """Returns the bytes that the training step needs on each device; infinite if unknown."""
        analysis = self.analysis(choice)
        if "refused" in analysis:
            return max(analysis["refused"] or math.inf, math.nextafter(self.where.usable, math.inf))
        return sum(footprint.memory_by_kind(self.program(choice), analysis).values())

    def state_fits(self, fsdp: int) -> bool:
        """Whether the state alone fits; this needs no compilation."""
        choice = dataclasses.replace(self.asked, fsdp=fsdp)
        return footprint.state_bytes(self.program(choice)) <= self.where.usable

    def first_fitting(self) -> Choice | None:
        """Returns the first combination that fits, see `choices`, or None."""
        sizes = pass_sizes(self.config, len(self.where.devices))
        if trains_statistics(self.program(self.asked)):
            # Passes of another size would change the result.
            sizes = [self.asked.pass_size]
        return first_fitting(
            self.asked,
            sizes=sizes,
            fsdps=[
                fsdp
                for fsdp in range(self.asked.fsdp, len(self.where.devices) + 1)
                if len(self.where.devices) % fsdp == 0 and self.state_fits(fsdp)
            ],
            needed=self.needed,
            fixed=lambda choice: footprint.state_bytes(self.program(choice)),
            available=self.where.usable,
        )


def _analyse(
    lowered: jax.stages.Lowered, program: Program, where: Slice, *, num_passes: int | None = None
) -> dict[str, Any]:
    """Returns `footprint.analyse`; that of a TPU slice is kept on disk."""
    passes = num_passes or program.num_passes
    analyse = functools.partial(footprint.analyse, num_devices=program.mesh.size, num_passes=passes)
    cache = jax.config.jax_compilation_cache_dir
    if where.topology == "local" or cache is None:
        return analyse(lowered)
    # jax's own cache does not work for devices that are not here.
    compiler = where.devices[0].client.platform_version
    key = f"{_COUNTING} {jax.__version__} {compiler} {where.topology} {passes}"
    digest = hashlib.sha256(f"{key}\n{lowered.as_text()}".encode()).hexdigest()
    path = Path(cache) / "plans" / f"{digest}.json"
    if (kept := read_or_set_aside(path)) is not None:
        return kept
    analysis = analyse(lowered)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, analysis)
    return analysis


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """Stands in for data that are not on this machine."""

    class_names: tuple[str, ...]
    num_images: int

    def class_counts(self) -> np.ndarray:
        """Returns int (K,); the counts are constants of the loss at most."""
        return np.ones(len(self.class_names), np.int64)

    def __len__(self) -> int:
        return self.num_images


def _stand_in(config: ConfigDict, num_classes: int, num_images: int) -> _StandIn | None:
    """Returns what stands in for the data; None: they are on this machine."""
    if num_classes:
        if config.train.total_epochs and not num_images:
            raise UserError(
                f"--num_images is missing: train.total_epochs={config.train.total_epochs} needs "
                "the number of training images. Or set train.total_steps, and "
                "train.total_epochs=0."
            )
        return _StandIn(tuple(map(str, range(num_classes))), num_images)
    if not _is_here(config.data.source, config.data.data_dir or None):
        raise UserError(
            f"data.source={config.data.source!r} is not on this machine, and a plan fetches "
            "nothing. Give its facts by flags: --num_classes, and with train.total_epochs also "
            "--num_images, the number of training images."
        )
    return None


def _is_here(source: str, data_dir: str | None) -> bool:
    scheme, _, rest = source.partition(":")
    if scheme in ("folder", "csv", "digits"):
        return True
    if scheme == "hf":
        return Path(rest.partition("?")[0].partition(":")[0]).expanduser().exists()
    return builders.is_prepared(builders.find_builder(source, data_dir=data_dir))


def _with_known_network(config: ConfigDict, arch: str) -> ConfigDict:
    """Returns the config; if the checkpoint's network is known, it is named in its place."""
    source = config.model.pretrained
    if source and not Path(source).expanduser().is_dir():
        arch = arch or ARCHS.get(source, "")
    if arch:
        if config.data.image_size is None:
            raise UserError("--arch needs data.image_size, which only the checkpoint has.")
        named = {"model.pretrained": "", "model.arch": arch, "model.head": "new"}
        return with_fields(config, named)
    if source:
        try:
            files = pretrained.find(source, allow_pickle=config.model.allow_pickle)
            pretrained.read_config(files, new_head=config.model.head == "new")
        except UserError as error:
            raise UserError(
                f"{error} Or name its network, with --arch=vit_b16 or --arch=resnet50 for example."
            ) from error
    return config


def make_plan(plans: Plans) -> dict[str, Any]:
    """Returns all figures, of the config as asked for or of the first combination that fits.

    Raises:
      UserError: nothing fits.
    """
    where, asked, config = plans.where, plans.asked, plans.config
    needed = plans.needed(asked)
    choice = asked if needed <= where.usable else plans.first_fitting()
    if choice is None:
        raise UserError(
            f"Nothing fits into the {where.usable / 1e9:.2f} GB of each device of {where.topology} "
            f"with train.global_batch_size={config.train.global_batch_size}: no pass, model.remat "
            "or mesh.fsdp that keeps the result. Use more devices, a smaller batch or image"
            + (
                ", or model.batch_norm='frozen', with which passes can be smaller."
                if trains_statistics(plans.program(asked))
                else "."
            )
        )
    program, analysis = plans.program(choice), plans.analysis(choice)
    memory = footprint.memory_by_kind(program, analysis)
    eval_batch_size, eval_memory = _fit_evaluation(plans, choice, memory)
    before = asked.fields() | {
        "mesh.data": config.mesh.data,
        "eval.batch_size": config.eval.batch_size,
    }
    after = choice.fields() | {"eval.batch_size": eval_batch_size}
    if choice.fsdp == asked.fsdp:
        after["mesh.data"] = config.mesh.data
    proposal = {name: value for name, value in after.items() if value != before[name]}
    step = chips.step_figures(
        analysis, where.chip, chips.sides(where.devices), dtype=config.model.dtype
    )
    images_per_second = config.train.global_batch_size / step["at_best_secs"]
    size = plans.program(choice).row["image"].shape
    return {
        "topology": where.topology,
        "chip": where.chip.name,
        "num_devices": len(where.devices),
        "num_hosts": where.num_hosts,
        "network": config.model.arch or config.model.pretrained,
        "image_size": list(size[:2]),
        "dtype": config.model.dtype,
        "global_batch_size": config.train.global_batch_size,
        "total_steps": config.train.total_steps,
        "asked": dataclasses.asdict(asked),
        "fits": not proposal,
        "bytes_asked": None if math.isinf(needed) else needed,
        "bytes_usable": where.usable,
        "proposal": proposal,
        "choice": dataclasses.asdict(choice),
        "num_parameters": _count(program.state_shapes.params, program.state_shapes.frozen),
        "num_trained": _count(program.state_shapes.params),
        "memory": memory,
        "eval_memory": eval_memory,
        "collectives": analysis["collectives"],
        "step": step,
        # A processor's caches serve reads that the compiler counts: real steps can be faster.
        "is_bound": where.devices[0].platform != "cpu",
        "hours": config.train.total_steps * step["at_best_secs"] / 3600,
        "images_per_second": images_per_second,
        "images_per_second_and_host": images_per_second / where.num_hosts,
        "pixels_per_second_and_host": images_per_second / where.num_hosts * math.prod(size),
    }


def _count(*trees: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trees))


def _fit_evaluation(
    plans: Plans, choice: Choice, memory: dict[str, int]
) -> tuple[int, dict[str, int]]:
    """Returns the largest evaluation batch that fits, at most the one asked for, and bytes by kind.

    The state stays in memory, and so do the selected weights, which are evaluated at the end.
    """
    program = plans.program(choice)
    kept = {kind: memory[kind] for kind in ("parameters", "optimizer", "average", "teacher")}
    num_devices, selects = len(plans.where.devices), bool(plans.config.eval.select_split)

    @functools.cache
    def by_kind(size: int) -> dict[str, int]:
        analysis = plans.eval_analysis(choice, size * num_devices)
        if "refused" in analysis:
            return {"refused": math.inf}
        batch = footprint.bytes_of(program.batch_shapes(size * num_devices))
        return kept | {
            "selected weights": analysis["arguments"] - batch if selects else 0,
            "batch": batch,
            "activations and temporaries": analysis["temporaries"] + analysis["results"],
            "programs": memory["program"] + analysis["program"],
        }

    sizes = list(_halved(plans.config.eval.batch_size // num_devices))
    size = footprint.largest_fitting(
        sizes,
        lambda size: sum(by_kind(size).values()),
        fixed=sum(kept.values()),
        available=plans.where.usable,
    )
    if size is None:
        raise UserError(
            f"Training fits into the {plans.where.usable / 1e9:.2f} GB of each device, but not its "
            "state together with an evaluation, even of one image at a time. Set mesh.fsdp."
        )
    return size * num_devices, by_kind(size)


def _halved(size: int) -> Iterator[int]:
    while size:
        yield size
        size //= 2
