"""Memory and work of a compiled step on each device, by its compiler, and whether it fits."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vitcls.costs import chips, traffic
from vitcls.costs.collectives import find_collectives
from vitcls.logs.parameters import bytes_per_device
from vitcls.processes.memory import available_memory
from vitcls.step import sharding

# Share of the free memory that a step may use; the compiler does not count fragments or the host.
SHARE = 0.8
# "Used 21.3G of 15.75G hbm", or "memory required for HLO temporaries (21.3G) exceeds"
_NEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)")


def analyse(lowered: jax.stages.Lowered, *, num_devices: int, num_passes: int) -> dict[str, Any]:
    """Compiles a step and returns its figures, for one device and one step.

    The compiler counts a loop's body once. So its counts are multiplied by the number of passes,
    except those of reading arguments and writing results. On a TPU the bytes are those between chip
    and memory, see `traffic`; the compiler's own count includes its fast memory.

    Returns:
      `arguments`, `temporaries`, `results` (that reuse no argument's memory) and `program` in
      bytes; `flops`; `bytes_accessed`; `collectives`, see `find_collectives`. If the compiler
      refuses the step for lack of memory, only `refused`: the bytes that it needs, or None if its
      message does not say.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # TPU's compiler refuses what does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _NEEDED.search(str(error))
        if found is None:
            return {"refused": None}
        return {"refused": float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text()
    flops = cost.get("flops", 0.0) * num_passes
    if traffic.is_tiled(text):
        flops += traffic.repeated_flops(text, num_passes=num_passes)
        found = traffic.find_traffic(text, num_passes=num_passes)
        accessed = sum((one.read + one.written) * one.times for one in found)
    else:
        accessed = cost.get("bytes accessed", 0.0)
        outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
        accessed = max(accessed - outside, 0) * num_passes + min(accessed, outside)
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "flops": flops,
        "bytes_accessed": accessed,
        "collectives": find_collectives(text, num_devices=num_devices, num_passes=num_passes),
    }


def memory_by_kind(program: Any, analysis: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes on each device while training, by purpose.

    Args:
      program: A `program.Program`.
      analysis: Analysis of its training step; a refused step itself counts as nothing.
    """
    kinds = _state_by_kind(program)
    batch = bytes_of(
        program.batch_shapes(program.mesh.size * program.num_passes * program.pass_size)
    )
    kinds["batch"] = 2 * batch  # the next one arrives during a step
    if "refused" in analysis:
        return kinds
    # Arrays are padded to the tiles that the device computes with. Unused ones are not arguments.
    kinds["padding"] = max(analysis["arguments"] - (sum(kinds.values()) - batch), 0)
    kinds["activations and temporaries"] = analysis["temporaries"] + analysis["results"]
    kinds["program"] = analysis["program"]
    return kinds


def _state_by_kind(program: Any) -> dict[str, int]:
    state, shardings = program.state_shapes, program.state_shardings
    kinds = {
        "parameters": ("step", "params", "frozen", "batch_stats"),
        "optimizer": ("opt_state",),
        "average": ("ema",),
        "teacher": ("teacher",),
    }
    return {
        kind: sum(bytes_of(getattr(state, name), getattr(shardings, name)) for name in names)
        for kind, names in kinds.items()
    }


def state_bytes(program: Any) -> int:
    """Returns the bytes of a program's state on each device."""
    return sum(_state_by_kind(program).values())


def bytes_of(shapes: Any, shardings: Any = None) -> int:
    """Bytes on one device of shapes that are placed as they say, or as `shardings` say."""
    if shardings is not None:
        shapes = sharding.placed(shapes, shardings)
    return bytes_per_device(shapes)


def bytes_needed(program: Any) -> float:
    """Compiles a training step; returns its bytes on each device, infinite if it is refused."""
    analysis = analyse(
        program.lower(), num_devices=program.mesh.size, num_passes=program.num_passes
    )
    if "refused" in analysis:
        return analysis["refused"] or math.inf
    return sum(memory_by_kind(program, analysis).values())


def largest_fitting(
    sizes: Sequence[int], needed: Callable[[int], float], *, fixed: float, available: float
) -> int | None:
    """Returns the largest size that fits, or None; calls `needed` as rarely as it can.

    Args:
      sizes: To choose from, largest first.
      needed: Bytes that a size needs; infinite if unknown.
      fixed: A lower bound of the bytes that do not depend on the size; the others grow with it.
      available: Bytes available.
    """
    max_size = math.inf
    for size in sizes:
        if size > max_size:
            continue
        bytes_ = needed(size)
        if bytes_ <= available:
            return size
        if fixed < bytes_ < math.inf:  # no larger size can fit
            max_size = size * (available - fixed) / (bytes_ - fixed)
    return None


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices are CPUs, which share the machine's memory."""
    return mesh.devices.flat[0].platform == "cpu"


def available_bytes(mesh: Mesh) -> float:
    """Returns the free memory of each device, the least over all processes."""
    if on_cpu(mesh):  # simulated devices share the machine's
        available = available_memory() / len(mesh.local_devices)
    else:
        # Without the allocator's statistics (None), everything counts as fitting.
        stats = [device.memory_stats() or {} for device in mesh.local_devices]
        available = min(s.get("bytes_limit", math.inf) - s.get("bytes_in_use", 0) for s in stats)
    if jax.process_count() == 1:
        return available
    return float(multihost_utils.process_allgather(np.float32(available)).min())


def usable_bytes(mesh: Mesh) -> float:
    """Returns how much of the free memory a step may need."""
    return SHARE * available_bytes(mesh)


def planned_and_measured(program: Any, *, dtype: str, images_per_second: float) -> dict[str, Any]:
    """Returns, after training, the planned and the measured figures of its step.

    The step is compiled already. Seconds are planned for devices in `chips.CHIPS`; memory is
    measured if the device counts it. Otherwise they are None.
    """
    devices = list(program.mesh.devices.flat)
    num_images = program.num_passes * program.pass_size * program.mesh.size
    analysis = analyse(program.lower(), num_devices=len(devices), num_passes=program.num_passes)
    chip = chips.find_chip(devices[0].device_kind)
    planned = None
    if chip is not None:
        step = chips.step_figures(analysis, chip, chips.sides(devices), dtype=dtype)
        planned = step["at_best_secs"]
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use")
        for device in program.mesh.local_devices
    ]
    return {
        "flops_per_step_and_device": analysis["flops"],
        "step_secs": {
            "planned": planned,
            "measured": num_images / images_per_second,
        },
        "bytes_per_device": {
            "planned": sum(memory_by_kind(program, analysis).values()),
            "measured": None if None in peaks else max(peaks),
        },
    }
