r"""Predicts the memory and the minimal time of a run, without the hardware.

  python -m vitcls.plan --config=configs/vit_b16.py:data=tfds:imagenet2012 --topology=v5e:16x16 \
    --num_classes=1000

Compiles the training and the evaluation step for a slice of TPUs (v4, v5e, v5p, v6e, tpu7x), which
needs Linux, an x86-64 processor and pip install 'jax[tpu]', or with --topology=local for the
devices of this machine. Prints the memory of each device by purpose, the operations, the exchanges
between devices, the time of a step and of the run, and the images per second that the hosts must
supply. If a step does not fit, proposes the combination of train.micro_batch, model.remat and
mesh.fsdp that does at the least cost in time; these do not change the result.

Times are bounds from the devices' rates, not measurements. A compilation takes minutes on a small
machine; its figures are kept in ~/.cache/vitcls/xla.

Neither weights nor data are needed: if data are not on this machine, flags give their numbers of
classes and images. Any field of the config can be overridden, as for vitcls.main.
"""

import functools
from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.config.checks import check_config
from vitcls.costs import chips
from vitcls.files import make_folder, write_json
from vitcls.folders import ownership

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "local",
    "Slice of TPUs, such as v5e:4x4 or v5p:2x2x2. local: this machine's devices.",
)
_ARCH = flags.DEFINE_string(
    "arch", "",
    "Network, such as vit_b16, in place of model.pretrained. Empty: known for the recipes' "
    "checkpoints, read from others.",
)  # fmt: skip
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", 0, "Classes of data that are not on this machine. 0: they are.", lower_bound=0
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 0,
    "Training images of data that are not on this machine; only train.total_epochs needs it.",
    lower_bound=0,
)  # fmt: skip
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the table.")
_OUTPUT = flags.DEFINE(cli.PATH, "output", "", "JSON file to write besides. Empty: none.")


def main() -> None:
    """Checks the flags, then plans."""
    config = cli.config_value(_CONFIG)
    check_config(config)
    topology = cli.required(_TOPOLOGY)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        own = functools.partial(ownership.has_keys, output, "topology", "chip", "choice")
        ownership.check_file("--output", output, is_own=own)
    if topology != "local":
        chips.parse_topology(topology)
        chips.prepare_environment()
    import json

    import jax  # after its environment is prepared

    from vitcls.plan import planning, slices
    from vitcls.plan.table import format_plan

    cli.prepare_jax()
    # jax could not read cached programs for other devices. `planning` caches figures instead.
    if topology != "local":
        jax.config.update("jax_enable_compilation_cache", False)
    if _OUTPUT.value:
        make_folder(Path(_OUTPUT.value).parent, flag="--output")
    plans = planning.Plans(
        config,
        slices.open_slice(topology, dtype=config.model.dtype),
        arch=_ARCH.value,
        num_classes=_NUM_CLASSES.value,
        num_images=_NUM_IMAGES.value,
    )
    plan = planning.make_plan(plans)
    print(json.dumps(plan, indent=2) if _JSON.value else format_plan(plan))
    if _OUTPUT.value:
        write_json(Path(_OUTPUT.value), plan)


if __name__ == "__main__":
    cli.run(main)
