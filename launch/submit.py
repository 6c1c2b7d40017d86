r"""Starts one run: on this machine, or on a cluster.

  python -m launch.submit --on=local --config=configs/quickstart.py --workdir=runs/quickstart
  python -m launch.submit --on=slurm --config=configs/vit_b16.py:data=folder:/data/pets \
    --workdir=/shared/runs/pets --nodes=2 --gpus_per_node=8 --time=24:00:00 --sbatch=--partition=gpu
  python -m launch.submit --on=kubernetes --config=configs/vit_b16.py:data=folder:/data/pets \
    --workdir=/runs/pets --image=REGISTRY/vitcls:1 --volume=pets:/data --volume=runs:/runs \
    --tpu=v5e:4x4
  python -m launch.submit --on=tpu-vm --config=configs/vit_b16.py:data=folder:/mnt/data/pets \
    --workdir=/mnt/runs/pets --tpu=my-tpu --zone=us-west4-a

--dry_run shows the script, the manifest or the command instead. The run is `python -m vitcls.main`
with the same --config, --config.FIELD=VALUE and --workdir. It is always started again after exit
code 75 (stopped after saving), never after 2 (a mistake) or 87 (a loss that is not finite), and
after any other failure at most --max_restarts times. docs/cluster.md shows each way step by step.
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from launch import commands, kubernetes, local, resources, slurm, tpu_vm
from vitcls import cli
from vitcls.files import expand, make_folder
from vitcls.folders import ownership
from vitcls.folders.ownership import has_text
from vitcls.folders.workdir import Workdir

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, visible to all its machines.")
_ON = flags.DEFINE_enum("on", None, ["local", "slurm", "kubernetes", "tpu-vm"], "Where to run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only show what would be submitted.")
_TPU = flags.DEFINE_string(
    "tpu", "", "Kubernetes: kind and topology, such as v5e:4x4; TPU VM: its name."
)
_IMAGE = flags.DEFINE_string("image", "", "Kubernetes: container image with the repository.")
_VOLUME = flags.DEFINE_multi_string(
    "volume",
    [],
    "Kubernetes: CLAIM:/PATH, a persistent volume claim and its mount point",
)
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes: namespace of the JobSet.")
_FOLDER = flags.DEFINE_string(
    "folder", "vitcls", "TPU VM: folder of the repository on its machines, from the home folder."
)
_ZONE = flags.DEFINE_string("zone", "", "TPU VM: its zone; empty: gcloud's default.")
_PROJECT = flags.DEFINE_string("project", "", "TPU VM: its project; empty: gcloud's default.")
flags.adopt_module_key_flags(resources)

# Values of --on that a flag applies to; flags that are not here or in `resources` apply to all.
_PLACES = {
    "image": ("kubernetes",),
    "volume": ("kubernetes",),
    "namespace": ("kubernetes",),
    "tpu": ("kubernetes", "tpu-vm"),
    "folder": ("tpu-vm",),
    "zone": ("tpu-vm",),
    "project": ("tpu-vm",),
}


def main() -> None:
    """Checks the flags and the config, then shows or submits."""
    config = cli.config_value(_CONFIG)
    workdir, place = cli.required(_WORKDIR), cli.required(_ON)
    # Elsewhere `~` is the home folder on the machine that runs it.
    is_here = place in ("local", "slurm")
    if is_here:
        workdir = str(expand(workdir))
    resources.check_places(place, _PLACES)
    asked = resources.from_flags()
    commands.check(config, here=place == "local")
    if is_here:
        Workdir(workdir).check_own()
    python = sys.executable if is_here else "python"
    command = [
        *(python, "-m", "vitcls.main", f"--config={flags.FLAGS['config'].config_filename}"),
        *commands.overrides(),
        f"--workdir={workdir}",
    ]
    {"local": _local, "slurm": _slurm, "kubernetes": _kubernetes, "tpu-vm": _tpu_vm}[place](
        command, workdir, asked
    )


def _local(command: list[str], workdir: str, asked: resources.Resources) -> None:
    if _DRY_RUN.value:
        print(shlex.join(command))
        return
    sys.exit(local.run(command, max_restarts=asked.max_restarts))


def _slurm(command: list[str], workdir: str, asked: resources.Resources) -> None:
    folder = Path(workdir).absolute()
    text = slurm.script(command, folder, asked)
    if _DRY_RUN.value:
        print(text, end="")
        return

    make_folder(folder)
    ownership.check(
        "--workdir", folder, ["submit.sh"],
        is_own=lambda: has_text(folder / "submit.sh", "#SBATCH --job-name=vitcls-"),
    )  # fmt: skip
    job = slurm.submit(text, folder / "submit.sh")
    print(f"Job {job}, log in {folder}/slurm-{job}.log; `scancel {job}` ends it.")


def _kubernetes(command: list[str], workdir: str, asked: resources.Resources) -> None:
    text = kubernetes.manifest(
        command, workdir, asked,
        image=cli.required(_IMAGE), volumes=_VOLUME.value, tpu=_TPU.value,
        namespace=_NAMESPACE.value,
    )  # fmt: skip
    print(text if _DRY_RUN.value else kubernetes.submit(text), end="" if _DRY_RUN.value else "\n")


def _tpu_vm(command: list[str], workdir: str, asked: resources.Resources) -> None:
    start = tpu_vm.start_command(
        tpu_vm.script(command, workdir, asked), workdir,
        tpu=cli.required(_TPU), folder=_FOLDER.value, zone=_ZONE.value, project=_PROJECT.value,
    )  # fmt: skip
    print(shlex.join(start) if _DRY_RUN.value else tpu_vm.submit(start))


if __name__ == "__main__":
    cli.run(main)
