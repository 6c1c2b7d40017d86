"""Commands write over what they have written, and over nothing else."""

import functools
import json
from pathlib import Path

import pytest

from tests import forked
from vitcls.errors import UserError
from vitcls.folders import ownership
from vitcls.folders.workdir import Workdir

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT}/configs/quickstart.py:init=scratch"
WEIGHTS = ROOT / "assets/vit-nano-glyphs"
MANIFEST = {"command": [], "data": {}, "versions": {}}
RUN_CONFIG = {"data": {}, "model": {}, "optim": {}, "train": {}}
NAMES = [
    "manifest.json", "config.json", "model/config.json", "checkpoints/100/data", "metrics.jsonl",
    "skipped.jsonl", "nonfinite.jsonl", "predictions/test.npz", "results.json", "seen.npz",
]  # fmt: skip


def write(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_refused_where_it_would_write_over_something_else(name, tmp_path):
    write(tmp_path / name)
    top = name.partition("/")[0]
    with pytest.raises(UserError, match=f"--workdir: .* holds {top}, which this command has not"):
        Workdir(tmp_path).check_own()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("mark", "content"),
    [
        ("manifest.json", json.dumps(MANIFEST)),
        ("config.json", json.dumps(RUN_CONFIG)),  # killed before the manifest, which came later
        ("checkpoints/lock", "{}"),  # killed even before
    ],
)
def test_a_run_of_any_version_is_known(mark, content, name, tmp_path):
    if name != mark:
        write(tmp_path / name)
    write(tmp_path / mark, content)
    Workdir(tmp_path).check_own()


def test_what_others_put_into_a_workdir_is_left_alone(tmp_path):
    for name in ("slurm-7.log", "asked.json", "log.txt", "submit.sh", "notes/config.json"):
        write(tmp_path / name)
    for name in ("lost+found", "model", "checkpoints"):
        (tmp_path / name).mkdir()
    write(tmp_path / "results.json", "")  # nothing is lost
    Workdir(tmp_path).check_own()
    Workdir(tmp_path / "new").check_own()


@pytest.mark.parametrize("content", ['{"command": 1}', "[]", "", '{"comma'])
def test_a_manifest_of_another_program_is_none(content, tmp_path):
    write(tmp_path / "manifest.json", content)
    write(tmp_path / "config.json", '{"model_type": "vit"}')
    with pytest.raises(UserError, match="config.json"):
        Workdir(tmp_path).check_own()


@pytest.mark.parametrize(
    ("module", "names", "args"),
    [
        ("vitcls.main", ["config.json"], [CONFIG, "--workdir={}"]),
        ("launch.submit", ["config.json"], [CONFIG, "--workdir={}", "--on=local"]),
        ("launch.submit", ["model/x"], [CONFIG, "--workdir={}", "--on=slurm", "--dry_run"]),
        ("launch.sweep", ["sweep.csv"],
         [CONFIG, "--workdir={}", "--sweep=configs/sweeps/lr_wd.py", "--dry_run"]),
        ("vitcls.evaluate", ["results.json"], ["--checkpoint=x", "--data=digits", "--output={}"]),
        ("vitcls.evaluate", ["predictions/test.npz"],
         ["--checkpoint=x", "--data=digits", "--output={}"]),
        ("vitcls.predict", ["a.csv"], ["--checkpoint=x", "--images=y", "--output={}/a.csv"]),
        ("vitcls.predict", ["a.jsonl"], ["--checkpoint=x", "--images=y", "--output={}/a.jsonl"]),
        ("vitcls.export", ["any"],
         [f"--checkpoint={WEIGHTS}", "--format=huggingface", "--output={}"]),
        ("vitcls.soup", ["any"],
         [f"--checkpoints={WEIGHTS}", "--how=uniform", "--output={}"]),
        ("vitcls.probe", ["results.json"], ["--checkpoint=x", "--data=digits", "--output={}"]),
        ("vitcls.probe", ["model/x", "features/y"],
         ["--checkpoint=x", "--data=digits", "--output={}"]),
        ("vitcls.plan", ["plan.json"], [CONFIG, "--output={}/plan.json"]),
        ("vitcls.check_data", ["report.json"], ["--data=digits", "--output={}"]),
        ("vitcls.check_data", ["contact_sheet.png"], ["--data=digits", "--output={}"]),
        ("vitcls.analysis.compare", ["runs.csv"], ["{}", "--output={}"]),
        ("vitcls.analysis.select", ["selection.csv"],
         ["--candidates=x", "--data=digits", "--output={}"]),
        ("vitcls.analysis.report", ["report.html"], ["{}"]),
        ("vitcls.analysis.report", ["page.html"], ["{}", "--output={}/page.html"]),
        ("vitcls.analysis.results", ["kept.md"], ["{}/kept"]),
        ("vitcls.analysis.results", ["kept/x.json"], ["{}/kept", "--add={}/x"]),
        ("vitcls.analysis.reproduce", ["reproduced.json"], ["quickstart", "--workdir={}"]),
        ("vitcls.analysis.explain", ["any.png"],
         [f"--checkpoint={WEIGHTS}", "--images={}/any.png", "--output={}"]),
        ("benchmarks.all", ["figures.md"], ["--output={}/figures"]),
        ("benchmarks.startup", ["figures.json"], ["--json={}/figures.json"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_every_command_refuses_to_write_over_what_is_not_its_own(module, names, args, tmp_path):
    for name in names:
        write(tmp_path / "there" / name, '{"theirs": 1}')
    before = files_below(tmp_path)
    result = forked.run(module, *(arg.replace("{}", f"{tmp_path}/there") for arg in args))
    assert result.returncode == 2, result.stderr
    told = result.stderr
    assert "has not written and would overwrite" in told or "is not an empty folder" in told
    assert "Traceback" not in told and str(tmp_path) in told
    assert files_below(tmp_path) == before


def test_weights_are_not_written_over_by_the_run_that_starts_from_them(tmp_path):
    """Once this ended with 0, and the weights had the run's config.json."""
    weights = tmp_path / "weights"
    for name, content in files_below(WEIGHTS).items():
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        (weights / name).write_bytes(content)
    config = f"--config={ROOT}/configs/quickstart.py"
    result = forked.run(
        "vitcls.main", config, f"--config.model.pretrained={weights}", f"--workdir={weights}"
    )
    assert result.returncode == 2 and "holds config.json" in result.stderr
    assert files_below(weights) == files_below(WEIGHTS)


def test_files_are_known_by_what_is_in_them(tmp_path):
    lines = write(tmp_path / "a.jsonl", '{"split": 1, "id": 2}\ncut')
    assert ownership.has_keys(lines, "split", "id") and not ownership.has_keys(lines, "reason")
    assert not ownership.has_keys(tmp_path / "none.json", "a")
    page = write(tmp_path / "a.md", "# Results\n")
    has_text = functools.partial(ownership.has_text, page)
    assert has_text("# Res", at_start=True) and not has_text("Results", at_start=True)
    assert has_text("Results") and not has_text("other")
