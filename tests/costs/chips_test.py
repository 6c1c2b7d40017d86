"""Which slices can be planned for, and how long their exchanges take at least."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitcls.costs import chips
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:4x4", "Unknown chip of --topology 'v5'. Did you mean 'v5p'?"),
        ("H100:4x4", "Unknown chip of --topology 'H100'"),
        ("v5e", "--topology=v5e must give the 2 sides of a slice of v5e: v5e:4x4, for example."),
        ("v5e:4x4x4", "must give the 2 sides"),
        ("v5p:4x4", "must give the 3 sides of a slice of v5p: v5p:4x4x4, for example."),
        ("v5e:0x4", "must give the 2 sides"),
    ],
)
def test_what_is_no_slice_is_refused(topology, message):
    with pytest.raises(UserError) as error:
        chips.parse_topology(topology)
    assert message in str(error.value)


def test_slices_are_read():
    chip, sides = chips.parse_topology("v5e:16x8")
    assert chip.kind == "TPU v5 lite" and sides == (16, 8)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "H200")],
)
def test_devices_are_known_by_their_kind(kind, name):
    assert chips.find_chip(kind).name == name


def test_other_devices_are_not_known():
    assert chips.find_chip("cpu") is None


def test_the_sides_of_a_slice_are_those_of_its_devices():
    devices = [SimpleNamespace(coords=[x, y, 0]) for x in range(4) for y in range(2)]
    assert chips.sides(devices) == (4, 2, 1)
    assert chips.sides([SimpleNamespace()]) == ()


def exchange(kind: str, *, num_bytes: float, devices: int, times: int = 1) -> dict:
    return {"kind": kind, "bytes": num_bytes, "devices": devices, "times": times}


@pytest.mark.parametrize(
    ("chip", "sides", "bandwidth"),
    [
        ("v5e", (16, 16, 1), 200e9),  # rings in both directions on both axes
        ("v5e", (4, 4, 1), 100e9),  # lines
        ("v5e", (16, 8, 1), 150e9),
        ("v5e", (1, 4, 1), 50e9),
        ("v5p", (4, 4, 4), 600e9),
        ("H100", (), 450e9),
    ],
)
def test_a_sum_moves_an_array_twice_over_the_links_that_serve(chip, sides, bandwidth):
    chip = next(one for one in chips.CHIPS if one.name == chip)
    secs = chips.exchange_secs(chip, sides, [exchange("all-reduce", num_bytes=1e9, devices=256)])
    assert secs == pytest.approx(2e9 * 255 / 256 / bandwidth)


def test_gathering_moves_it_once_every_time():
    chip = next(one for one in chips.CHIPS if one.name == "v5e")
    one = exchange("all-gather", num_bytes=1e9, devices=4, times=3)
    assert chips.exchange_secs(chip, (4, 4, 1), [one]) == pytest.approx(3 * 0.75e9 / 100e9)
    assert chips.exchange_secs(chip, (1, 1, 1), []) == 0


def test_the_slowest_part_bounds_a_step():
    chip = next(one for one in chips.CHIPS if one.name == "H100")
    analysis = {"flops": 494e9, "bytes_accessed": 3.35e9, "collectives": []}
    step = chips.step_figures(analysis, chip, (), dtype="bfloat16")
    assert step["compute_secs"] == pytest.approx(494 / 989 * 1e-3)
    assert step["at_best_secs"] == step["memory_secs"] == pytest.approx(1e-3)
    assert step["at_worst_secs"] == pytest.approx(1e-3 + 494 / 989 * 1e-3)
    step = chips.step_figures(analysis, chip, (), dtype="float32")
    assert step["compute_secs"] == pytest.approx(1e-3)


def test_without_the_compiler_the_message_says_what_to_install():
    program = """
import sys
sys.modules["libtpu"] = None  # as if it were not installed
from vitcls.costs import chips
chips.prepare_environment()
chips.open_topology("v5e:2x2")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    message = "--topology=v5e:2x2 needs libtpu, the compiler for TPUs"
    assert message in result.stderr and "pip install 'jax[tpu]'" in result.stderr
