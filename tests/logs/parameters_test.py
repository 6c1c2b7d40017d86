"""The parameter table counts every parameter once; the digest knows each of them."""

import numpy as np

from vitcls.logs.parameters import parameter_table, sha256


def test_layers_that_differ_by_a_number_share_a_row():
    layers = {f"layer_{i}": {"kernel": np.zeros((4, 8))} for i in range(12)}
    table = parameter_table(
        {"encoder": layers}, {"head": {"bias": np.zeros(3)}}, {"norm": {"mean": np.zeros(2)}}
    )
    lines = table.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["encoder/layer_*/kernel", "4x8", "12", "384", "trained"],
        ["head/bias", "3", "1", "3", "frozen"],
        ["norm/mean", "2", "1", "2", "statistics"],
    ]
    assert lines[-1] == "384 parameters are trained, 3 frozen."


def test_the_digest_knows_names_shapes_and_values():
    tree = {"a": {"w": np.zeros((2, 3), np.float32)}}
    others = [
        {"a": {"v": np.zeros((2, 3), np.float32)}},
        {"a": {"w": np.zeros((3, 2), np.float32)}},
        {"a": {"w": np.float32([[0, 0, 0], [0, 0, 1e-45]])}},
    ]
    assert len({sha256(one) for one in [tree, *others]}) == 4
    assert sha256({"a": {"w": np.zeros((3, 2), np.float32).T}}) == sha256(tree)
