"""Every field is one row, and its row agrees with itself and with the other rows."""

import pytest
from ml_collections import ConfigDict

from vitcls.config.checks import bounds
from vitcls.config.fields import FIELDS, RUN_FIELDS, default_config
from vitcls.config.parse import flatten


def test_the_config_has_the_rows_and_their_defaults():
    config = default_config()
    names = [f"{group}.{field}" for group in config.to_dict() for field in config[group]]
    assert sorted(names) == sorted(FIELDS)
    assert flatten(config) == {
        name: field.value for name, field in FIELDS.items() if name != "optim.args"
    }


def test_configs_share_nothing():
    config = default_config()
    config.optim.args.momentum = 0.9
    assert default_config().optim.args.to_dict() == {}
    assert isinstance(FIELDS["optim.args"].default, dict) and not FIELDS["optim.args"].default


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if isinstance(f.default, type)])
def test_an_unset_field_takes_its_type_only(name):
    config: ConfigDict = default_config()
    group, field = name.split(".")
    assert config[group][field] is None
    with pytest.raises(TypeError):
        config[group][field] = "other"


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_agrees_with_itself_and_the_others(name):
    field = FIELDS[name]
    assert field.text.endswith(".") and "  " not in field.text
    assert not field.among or field.value in field.among
    if field.at_least is not None and field.value is not None:
        highest = field.below if field.at_most is None else field.at_most
        assert field.at_least <= field.value <= highest and bounds(field)
    for other, value in field.needs.items():
        assert other in FIELDS and value in (FIELDS[other].among or (value,))


def test_fields_that_may_change_are_those_of_the_rows():
    assert set(RUN_FIELDS) == {name for name, field in FIELDS.items() if field.may_change}
    assert {"mesh.fsdp", "data.cache"} <= set(RUN_FIELDS)
    assert not {"optim.lr", "train.seed", "model.attention"} & set(RUN_FIELDS)
