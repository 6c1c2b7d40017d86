"""A continued run has the config that it began with, except where it may change."""

import json

import pytest
from ml_collections import ConfigDict

from tests.config.configs import valid_config
from vitcls.config.checks import drop_unused
from vitcls.errors import UserError
from vitcls.provenance.saved_config import check_same_run


def test_what_has_no_effect_is_not_compared_on_continuing(tmp_path):
    """Runs that began before it was refused, or when a recipe had another value, continue."""
    config = valid_config()
    config.eval.update(select_split="", every_steps=50)
    config.data.update(crop="none", crop_scale=(0.6, 1.0))
    path = saved(config, tmp_path)
    drop_unused(config, given=[])
    assert config.eval.every_steps == 0
    check_same_run(config, path)


def saved(config: ConfigDict, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    return path


def test_continuing_with_the_same_or_run_fields_is_allowed(tmp_path):
    path = saved(valid_config(), tmp_path)
    config = valid_config()
    config.log.every_steps = 3
    config.data.num_workers = 2
    config.data.cache = "/scratch"
    config.train.total_steps = 20
    check_same_run(config, path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_config_that_a_run_lost_is_a_message(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    message = "config.json, the config of a run that has checkpoints, cannot be read .*put it back"
    with pytest.raises(UserError, match=message):
        check_same_run(valid_config(), path)


def test_continuing_with_other_identity_fields_lists_them(tmp_path):
    path = saved(valid_config(), tmp_path)
    config = valid_config()
    config.optim.lr = 0.5
    config.optim.args.b1 = 0.8
    config.train.total_steps = 5
    with pytest.raises(UserError) as error:
        check_same_run(config, path)
    message = str(error.value)
    assert "optim.lr: 0.0001 there, 0.5 asked for" in message
    assert "optim.args.b1: None there, 0.8 asked for" in message
    assert "train.total_steps: 10 there, 5 asked for" in message


def test_a_longer_run_may_begin_its_schedule_anew_after_what_was_planned(tmp_path):
    path = saved(valid_config(), tmp_path)
    config = valid_config()
    config.train.total_steps = 20
    for step in (10, 15):
        config.optim.restarts = (step,)
        check_same_run(config, path)
    config.optim.restarts = (9,)
    with pytest.raises(UserError, match=r"optim.restarts: \[\] there, \[9\] asked for"):
        check_same_run(config, path)
    config.optim.restarts = (10,)
    path = saved(config, tmp_path)
    config.train.total_steps = 30
    config.optim.restarts = (10, 20)
    check_same_run(config, path)
    config.optim.restarts = (20,)  # the steps that were taken would have had other rates
    with pytest.raises(UserError, match=r"optim.restarts: \[10\] there, \[20\] asked for"):
        check_same_run(config, path)


def test_epochs_may_grow_as_steps_may(tmp_path):
    config = valid_config()
    config.train.update(total_steps=0, total_epochs=2.0)
    path = saved(config, tmp_path)  # as a sweep writes what it asks for
    config.train.total_epochs = 3.0
    check_same_run(config, path)
    config.train.total_epochs = 1.0
    with pytest.raises(UserError, match="train.total_epochs: 2.0 there, 1.0 asked for"):
        check_same_run(config, path)


def test_a_field_that_a_run_did_not_have_counts_as_its_default(tmp_path):
    config = valid_config()
    path = tmp_path / "config.json"
    content = config.to_dict()
    del content["optim"]["restarts"], content["eval"]["tta"]
    path.write_text(json.dumps(content))
    check_same_run(config, path)
    config.eval.tta = "flip"
    with pytest.raises(UserError, match="eval.tta: 'none' there, 'flip' asked for"):
        check_same_run(config, path)


def test_fields_that_a_run_lacks_have_the_values_of_then(tmp_path):
    path = saved(valid_config(), tmp_path)
    content = json.loads(path.read_text())
    del content["model"]["attention"], content["data"]["division"]
    path.write_text(json.dumps(content))
    config = valid_config()
    check_same_run(config, path)  # an empty division is that of the run
    config.data.division = "position"
    check_same_run(config, path)
    config.data.division = "hash"
    with pytest.raises(UserError, match="data.division: 'position' there, 'hash' asked for"):
        check_same_run(config, path)
    config.data.division, config.model.attention = "", "cudnn"
    with pytest.raises(UserError, match="model.attention: 'xla' there, 'cudnn' asked for"):
        check_same_run(config, path)


def test_moved_fields_may_differ(tmp_path):
    path = saved(valid_config(), tmp_path)
    config = valid_config()
    config.data.source = "folder:elsewhere"
    check_same_run(config, path, moved=["data.source"])
    with pytest.raises(UserError, match="data.source"):
        check_same_run(config, path)


@pytest.mark.parametrize("name", ["optim.gone", "lost.field"])
def test_a_field_that_is_gone_is_an_error_that_names_it(tmp_path, name):
    config = valid_config()
    config.optim.args.momentum = 0.9
    path = tmp_path / "config.json"
    content = config.to_dict()
    group, field = name.split(".")
    content.setdefault(group, {})[field] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        check_same_run(config, path)
    assert f"{path} has fields that this version of vitcls does not have: {name}." in str(
        error.value
    )
    assert "with the version that began it, or use another --workdir" in str(error.value)
    del content[group][field]
    path.write_text(json.dumps(content))
    check_same_run(config, path)
