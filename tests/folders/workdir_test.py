import pytest

from vitcls.errors import UserError
from vitcls.files import write_json
from vitcls.folders.workdir import Workdir


def test_a_run_is_finished_by_its_last_step(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.finished_results(20) is None
    workdir.finish({"step": 20})
    assert workdir.finished_results(20) == {"step": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    # A longer run has more to do.
    assert workdir.finished_results(30) is None


@pytest.mark.parametrize("left", ["", '{"step": 2', "[]"])
def test_results_that_are_cut_are_set_aside(left, tmp_path):
    workdir = Workdir(tmp_path)
    workdir.results.write_text(left)
    assert workdir.finished_results(20) is None
    assert [path.name for path in tmp_path.iterdir()] == ["results.json.unreadable"]


def test_folders_of_others_are_refused(tmp_path):
    write_json(tmp_path / "config.json", {"theirs": 1})
    with pytest.raises(UserError, match="config.json, which this command has not written"):
        Workdir(tmp_path).check_own()
