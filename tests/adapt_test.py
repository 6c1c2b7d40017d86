"""Parameters are divided by name, and put together again."""

import jax
import pytest

from vitcls import adapt
from vitcls.errors import UserError

PARAMS = {"encoder": {"layer_0": {"kernel": 1, "bias": 2}}, "classifier": {"kernel": 3}}


def test_split_and_merge_are_inverse():
    trained, frozen = adapt.split(PARAMS, "encoder/.*")
    assert trained == {"classifier": {"kernel": 3}}
    assert frozen == {"encoder": {"layer_0": {"kernel": 1, "bias": 2}}}
    assert adapt.merge(trained, frozen) == PARAMS


def test_nothing_is_frozen_without_a_pattern():
    assert adapt.split(PARAMS, "") == (PARAMS, {})
    assert adapt.merge(PARAMS, {}) == PARAMS


def test_pattern_matches_whole_names():
    _, frozen = adapt.split(PARAMS, ".*/bias")
    assert len(jax.tree.leaves(frozen)) == 1
    with pytest.raises(UserError, match="matches no parameter"):
        adapt.split(PARAMS, "encoder")


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="nothing is left to train"):
        adapt.split(PARAMS, ".*")


def test_subtree_keeps_what_the_other_tree_has():
    assert adapt.subtree(PARAMS, {"classifier": {"kernel": None}}) == {"classifier": {"kernel": 3}}
