"""How a device's rows are divided into passes."""

import pytest

from vitcls import program
from vitcls.errors import UserError


@pytest.mark.parametrize(
    ("num_rows", "micro_batch", "size"),
    [(128, None, 128), (128, 32, 32), (128, 128, 128), (16, 32, 16), (48, 32, 24), (61, 61, 61),
     (6, 1, 1), (100, 30, 25)],
)  # fmt: skip
def test_passes_are_equal_and_not_above_what_is_asked_for(num_rows, micro_batch, size):
    assert program._pass_size(num_rows, micro_batch) == size


@pytest.mark.parametrize(("num_rows", "micro_batch"), [(61, 32), (122, 48), (101, 100)])
def test_passes_far_below_what_is_asked_for_are_refused(num_rows, micro_batch):
    with pytest.raises(UserError, match=f"the {num_rows} images that each device"):
        program._pass_size(num_rows, micro_batch)
