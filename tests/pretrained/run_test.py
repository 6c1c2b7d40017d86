"""Which run, and which of its checkpoints, a reference names."""

import pytest

from vitcls.pretrained.run import find_run


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    for name in ("run", "run@7"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").touch()
        (tmp_path / name / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("checkpoint", "directory", "which"),
    [
        ("run", "run", None),
        ("run@best", "run", "best"),
        ("run@12", "run", "12"),
        ("run@latest", "run", "latest"),  # `Run` refuses it with what there is
        ("run@7", "run@7", None),  # a folder that exists comes first
        ("run@7@last", "run@7", "last"),
    ],
)
def test_references_to_runs(workdir, checkpoint, directory, which):
    run = find_run(checkpoint)
    assert (str(run.directory), run.which) == (directory, which)


@pytest.mark.parametrize("checkpoint", ["", "@best", "google/vit@main", "run/model", "other@best"])
def test_what_is_no_run(workdir, checkpoint):
    assert find_run(checkpoint) is None
