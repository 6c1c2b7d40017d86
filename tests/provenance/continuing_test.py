"""What a workdir tells of a run that is continued."""

import contextlib
import json
from types import SimpleNamespace

import pytest

from tests.run.configs import make_config
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.files import write_json
from vitcls.folders.workdir import Workdir
from vitcls.provenance import continuing
from vitcls.provenance.continuing import read_begun
from vitcls.run.program import with_fields


def save_config(config, workdir):
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"train.total_steps": 2000, "optim.schedule": "constant"}, None),
        (
            {"train.total_steps": 2000},
            "train.total_steps=2000 lengthens a run of 1000 steps: the learning rate goes from "
            "1.8e-07 in step 990 to 0.00027 in the next. optim.schedule='cosine' is laid out anew "
            "over all steps. Given in the first longer start, --config.optim.restarts='(1000,)' "
            "begins it anew after step 1000 instead, with its warm-up.",
        ),
        (
            {"train.total_steps": 2000, "optim.restarts": (1000,)},
            "from 1.8e-07 in step 990 to 1.5e-07 in the next. optim.restarts=(1000,) begins optim.",
        ),
    ],
)
def test_a_run_that_is_lengthened_says_what_its_rate_does(fields, message, tmp_path):
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.update(lr=5e-4, warmup_steps=100)
    save_config(config, tmp_path)
    config = with_fields(config, fields)
    found = continuing.rate_changes(config, tmp_path / "config.json", step=990)
    assert len(found) == (message is not None) and (message or "") in "".join(found)


def test_a_run_that_began_with_another_step_schedule_says_so(tmp_path):
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.update(schedule="step", warmup_steps=100)
    save_config(config, tmp_path)
    assert not continuing.rate_changes(config, tmp_path / "config.json", step=320)
    old = config.copy_and_resolve_references()
    del old.optim.restarts
    save_config(old, tmp_path)
    (warning,) = continuing.rate_changes(config, tmp_path / "config.json", step=320)
    assert "this run began when it did so at those of what follows the warm-up" in warning
    assert warning.endswith("It continues with a learning rate of 1e-05.")


@pytest.mark.parametrize(
    ("batch_norm", "batch_stats", "is_refused"),
    [("train", {"mean": 0}, True), ("frozen", {"mean": 0}, False), ("train", {}, False)],
)
def test_a_trained_batch_norm_keeps_its_passes(batch_norm, batch_stats, is_refused):
    config = default_config()
    config.model.batch_norm = batch_norm
    shapes = SimpleNamespace(batch_stats=batch_stats)
    program = SimpleNamespace(num_passes=2, state_shapes=shapes, config=config)
    continuing.check_same_passes(2, program)
    message = "began with 4 passes per step and would continue with 2"
    with pytest.raises(UserError, match=message) if is_refused else contextlib.nullcontext():
        continuing.check_same_passes(4, program)


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
