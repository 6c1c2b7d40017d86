"""Which of several summaries is the best."""

import pytest

from vitcls.errors import UserError
from vitcls.evaluate.summary import best_name, select_score


def test_what_is_not_finite_is_never_the_best():
    nan, inf = float("nan"), float("inf")
    good, tied, worse = (
        {"accuracy": a, "loss": x} for a, x in ((0.9, 0.4), (0.9, 0.3), (0.8, 0.1))
    )
    for bad in ({"accuracy": 0.95, "loss": nan}, {"accuracy": nan, "loss": 0.0}):
        for found in ({"bad": bad, "good": good}, {"good": good, "bad": bad}):
            assert best_name(found, "accuracy") == "good"
            assert best_name(found, "loss") == "good"
    assert select_score({"accuracy": 0.9, "loss": inf}, "accuracy") == -inf
    assert best_name({"good": good, "tied": tied, "worse": worse}, "accuracy") == "tied"
    assert best_name({"b": good, "a": dict(good)}, "accuracy") == "b"
    with pytest.raises(UserError, match="None of 0.0, 0.5 can be chosen: the accuracy of all"):
        best_name({0.0: bad, 0.5: bad}, "accuracy")
    with pytest.raises(UserError, match="'top5_accuracy', which is to choose, does not exist here"):
        select_score(good, "top5_accuracy")
