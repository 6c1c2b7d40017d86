"""What a workdir tells of a run that is continued."""

import pytest

from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.files import write_json
from vitcls.folders.workdir import Workdir
from vitcls.provenance.continuing import read_begun


def test_a_run_has_begun_once_a_step_is_saved(tmp_path):
    workdir = Workdir(tmp_path / "run")
    assert read_begun(workdir) is None
    workdir.make()
    assert workdir.path.is_dir() and read_begun(workdir) is None
    (workdir.checkpoints / "10").mkdir(parents=True)
    with pytest.raises(UserError, match="put it back, or use another --workdir"):
        read_begun(workdir)
    config = default_config()
    config.train.seed = 7
    write_json(workdir.config, config.to_dict())
    begun = read_begun(workdir)
    assert begun.config.train.seed == 7 and begun.model == workdir.path / "model"
