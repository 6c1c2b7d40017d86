"""The search for what fits takes the cheapest first and compiles as little as it can."""

import itertools
import math

import pytest

from vitcls.config.fields import REMATS
from vitcls.costs import footprint
from vitcls.plan.choices import Choice, first_fitting

SIZES = [64, 32, 16, 8, 4, 2, 1]
ASKED = Choice(fsdp=1, remat="none", pass_size=64)


def search(needed, *, available, asked=ASKED, sizes=SIZES, fsdps=(1, 2, 4), fixed=lambda _: 0):
    tried = []

    def ask(choice):
        tried.append(choice)
        return needed(choice)

    found = first_fitting(
        asked, sizes=list(sizes), fsdps=list(fsdps), needed=ask, fixed=fixed, available=available
    )
    return found, tried


def linear(choice: Choice) -> float:
    """A state of 100, of which each device keeps a part, and activations by pass and remat."""
    kept = {"none": 10, "dots": 6, "full": 2}[choice.remat]
    return 100 / choice.fsdp + kept * choice.pass_size


def test_smaller_passes_come_first():
    found, tried = search(linear, available=430)
    assert found == Choice(1, "none", 32) and tried == [ASKED, found]


def test_then_layers_are_computed_again_then_parameters_are_shared_then_passes_become_small():
    assert search(linear, available=100 + 6 * 8)[0] == Choice(1, "dots", 8)
    assert search(linear, available=100 + 2 * 8)[0] == Choice(1, "full", 8)
    assert search(linear, available=70)[0] == Choice(2, "full", 8)
    assert search(linear, available=39)[0] == Choice(4, "none", 1)
    assert search(linear, available=20)[0] is None


def test_what_is_asked_for_is_where_it_starts():
    asked = Choice(fsdp=2, remat="dots", pass_size=16)
    found, tried = search(linear, available=50 + 6 * 8, asked=asked, fsdps=(2, 4))
    assert found == Choice(2, "dots", 8)
    assert all(c.fsdp >= 2 and c.remat != "none" and c.pass_size <= 16 for c in tried)


def test_sizes_that_cannot_fit_are_not_compiled():
    found, tried = search(linear, available=100 + 10 * 8, fixed=lambda choice: 100 / choice.fsdp)
    assert found == Choice(1, "none", 8)
    assert [choice.pass_size for choice in tried] == [64, 8]


def test_a_compiler_that_only_says_no_is_asked_for_every_size():
    def needed(choice):
        return linear(choice) if choice.pass_size <= 16 else math.inf

    found, tried = search(needed, available=300)
    assert found.pass_size == 16 and [c.pass_size for c in tried] == [64, 32, 16]


@pytest.mark.parametrize(
    ("fixed", "each", "available"),
    list(itertools.product([0.0, 50.0, 90.0], [0.7, 3.0, 11.0], [91.0, 120.0, 400.0])),
)
def test_it_is_the_largest_that_fits(fixed, each, available):
    sizes = [96, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]

    def needed(size):
        return fixed + 20 + each * size

    expected = max((s for s in sizes if needed(s) <= available), default=None)
    found = footprint.largest_fitting(sizes, needed, fixed=fixed, available=available)
    assert found == expected


def test_a_choice_is_what_the_config_needs():
    assert Choice(4, "dots", 8).fields() == {
        "mesh.data": -1,
        "mesh.fsdp": 4,
        "model.remat": "dots",
        "train.micro_batch": 8,
    }
    assert Choice(4, "dots", 8).line() == "8 images in a pass, remat dots, fsdp 4"
    assert set(REMATS) == {"none", "dots", "full"}
