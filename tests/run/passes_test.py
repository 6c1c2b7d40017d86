"""How the batch of a step is divided into passes."""

import pytest

from vitcls.errors import UserError
from vitcls.run.passes import pass_size


@pytest.mark.parametrize(
    ("num_rows", "micro_batch", "size"),
    [(128, None, 128), (128, 32, 32), (128, 128, 128), (16, 32, 16), (48, 32, 24), (61, 61, 61),
     (6, 1, 1), (100, 30, 25)],
)  # fmt: skip
def test_passes_are_equal_and_not_above_what_is_asked_for(num_rows, micro_batch, size):
    assert pass_size(num_rows, micro_batch) == size


def test_passes_hold_pairs_together_where_they_are_mixed():
    assert pass_size(60, 31, group_size=2) == 30
    assert pass_size(30, 15, group_size=2) == 10
    for num_rows, micro_batch in [(61, None), (60, 1)]:
        with pytest.raises(UserError, match="augment.mixup and augment.cutmix mix pairs, which"):
            pass_size(num_rows, micro_batch, group_size=2)


@pytest.mark.parametrize(("num_rows", "micro_batch"), [(61, 32), (122, 48), (101, 100)])
def test_passes_far_below_what_is_asked_for_are_refused(num_rows, micro_batch):
    with pytest.raises(UserError, match=f"the {num_rows} images that each device"):
        pass_size(num_rows, micro_batch)
