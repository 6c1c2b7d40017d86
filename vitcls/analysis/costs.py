"""Time, speed, memory and disk space of a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from vitcls.analysis.run import Run
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir


def describe_costs(run: Run) -> dict[str, str]:
    """Returns the known costs by name, formatted for the page."""
    found = {}
    for name, value in _flatten({k: v for k, v in run.results.items() if k != "splits"}):
        if isinstance(value, int | float) and math.isfinite(value):
            found[f"results.json: {name.replace('_', ' ')}"] = f"{value:,.6g}"
    speeds = _over_time(run, "train/images_per_second")
    if speeds.size:
        found["Training speed, median"] = (
            f"{np.median(speeds):,.1f} images/s ({speeds.min():,.1f} to {speeds.max():,.1f})"
        )
    waiting = _over_time(run, "train/waiting")
    if waiting.size:
        found["Waiting for data, mean"] = f"{waiting.mean():.1%} of the time"
    devices = run.manifest.get("devices")
    if isinstance(devices, dict):
        found["Devices"] = f"{devices.get('count')} x {devices.get('kind')}"
    workdir = Workdir(run.workdir)
    found |= _network(workdir.model)
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in workdir.checkpoints.glob("*")
        if folder.name.isdigit()
    }
    for step, size in sorted(sizes.items(), key=lambda item: int(item[0])):
        found[f"Checkpoint of step {step} on disk"] = f"{size / 1e6:,.1f} MB"
    return found


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("a.b", value) for every value of nested dicts."""
    flat = []
    for name, value in content.items():
        is_group = isinstance(value, dict)
        flat += _flatten(value, f"{prefix}{name}.") if is_group else [(f"{prefix}{name}", value)]
    return flat


def _over_time(run: Run, name: str) -> np.ndarray:
    values = [line.get(name) for line in run.history]
    return np.array([x for x in values if isinstance(x, int | float) and math.isfinite(x)])


def _network(folder: Path) -> dict[str, str]:
    """Counts parameters from the shapes alone: no weights are read."""
    # jax takes seconds to import, and nothing else here needs it.
    import jax
    import jax.numpy as jnp

    from vitcls import pretrained

    if not (folder / "preprocessor_config.json").is_file():
        return {}
    try:
        config, processor = pretrained.read_json(folder, tensors=None)
        model = pretrained.make_model(config, dtype=jnp.float32)
    except UserError:
        # `run.read_run` reports what is wrong with the folder.
        return {}
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *processor.size, 3)), train=False)
    )
    num = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    height, width = processor.size
    return {
        "Network": f"{config.family}, {height} x {width} pixels",
        "Parameters": f"{num:,}, {4 * num / 1e6:,.1f} MB in float32",
    }
