"""`~` is the home folder in every flag and every field of a config that is a path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vitcls import cli, files
from vitcls.errors import UserError

ROOT = Path(__file__).parent.parent
FIELDS = [
    "--config.data.data_dir=~/tfds", "--config.train.total_epochs=0",
    "--config.train.total_steps=1", "--config.optim.warmup_steps=0",
    "--config.data.image_size=(8, 8)",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits_dir) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "tfds").symlink_to(digits_dir)
    shutil.copy(ROOT / "configs/quickstart.py", folder / "recipe.py")
    shutil.copytree(ROOT / "assets/vit-nano-glyphs", folder / "weights")
    (folder / "cache").mkdir()
    (folder / "weights.json").write_text(json.dumps({str(digit): 1 for digit in range(10)}))
    for split in ("train", "test"):
        for digit in range(10):
            path = folder / f"photos/{split}/{digit}/{split}.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (8, 8), 20 * digit + len(split)).save(path)
    lines = [
        f"photos/{split}/{digit}/{split}.png,{digit},{split}\n"
        for split in ("train", "test")
        for digit in range(10)
    ]
    (folder / "photos.csv").write_text("image,label,split\n" + "".join(lines))
    (folder / "list").write_text("photos/test/0/test.png\n")
    (folder / "sweep.py").write_text("def get_sweep():\n    return [{'optim.lr': 1e-3}]\n")
    return folder


def run(home: Path, module: str, *args: str) -> str:
    """In the home folder's neighbour, where no folder of the name ~ may be made."""
    elsewhere = home.with_name(f"{home.name}-cwd")
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *args], cwd=elsewhere, capture_output=True, text=True,
        timeout=300, env=os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(elsewhere.iterdir())
    return done.stdout


@pytest.mark.slow
def test_every_path_of_a_run_and_of_what_follows_it(home):
    recipe = ["--config=~/recipe.py:init=scratch", "--config.model.arch=vit_mu4", *FIELDS]
    run(home, "vitcls.main", *recipe, "--workdir=~/run")
    run(
        home, "vitcls.main", "--config=~/recipe.py", *FIELDS, "--config.loss.teacher=~/run",
        "--config.model.pretrained=~/weights", "--config.loss.class_weights=~/weights.json",
        "--config.data.cache=~/cache", "--config.data.source=folder:~/photos", "--workdir=~/other",
        "--config.eval.select_split=", "--config.train.global_batch_size=8",
    )  # fmt: skip
    run(
        home, "vitcls.evaluate", "--checkpoint=~/run@last", "--data=csv:~/photos.csv",
        "--output=~/evaluated",
    )  # fmt: skip
    run(home, "vitcls.predict", "--checkpoint=~/run", "--images=@~/list", "--output=~/rows.csv")
    run(home, "vitcls.predict", "--checkpoint=~/run", "--images=~/photos", "--output=~/all.jsonl")
    run(home, "vitcls.soup", "--checkpoints=~/run@1", "--how=uniform", "--output=~/soup")
    run(home, "vitcls.check_data", "--data=folder:~/photos", "--output=~/checked")
    run(home, "vitcls.analysis.report", "~/run", "--noexplain", "--output=~/page.html")
    run(home, "vitcls.analysis.results", "~/kept", "--add=~/run")
    for name in (
        "run/results.json", "other/results.json", "evaluated/results.json", "rows.csv", "all.jsonl",
        "soup/soup.json", "checked/report.json", "page.html", "kept.md", "kept/run.json",
        "cache/vitcls-cache",
    ):  # fmt: skip
        assert (home / name).exists(), name


@pytest.mark.parametrize(
    ("module", "flags", "workdir"),
    [
        ("launch.submit", ["--on=local"], "{}/run2"),
        ("launch.submit", ["--on=slurm"], "{}/run2"),
        # The home folder of the machines of a TPU VM is another: there the run looks for it.
        ("launch.submit", ["--on=tpu-vm", "--tpu=t"], "~/run2"),
        ("launch.sweep", ["--sweep=~/sweep.py"], "{}/run2/optim.lr=0.001"),
    ],
    ids=lambda value: str(value),
)
def test_launchers(module, flags, workdir, home):
    config = "--config=~/recipe.py:init=scratch"
    told = run(home, module, config, "--workdir=~/run2", "--dry_run", *flags)
    assert f"--workdir={workdir.format(home)}" in told.replace("'", "").replace('"', "")
    assert f"--config={home}/recipe.py:init=scratch" in told


def test_without_a_home_folder_there_is_a_message():
    message = "~no_such_user/x cannot be used: its ~ has no home folder."
    with pytest.raises(UserError, match=message):
        files.expand("~no_such_user/x")
    with pytest.raises(UserError, match=message):
        cli._parse_flags(["x", "--config=~no_such_user/x"], "")
    assert files.expand("a/~/b") == Path("a/~/b")
