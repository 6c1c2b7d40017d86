"""`python -m vitcls.config` prints all fields, quickly."""

import subprocess
import sys
from pathlib import Path

from vitcls.config.__main__ import describe
from vitcls.config.fields import FIELDS

ROOT = Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_prints_every_field_in_order_and_groups_apart():
    done = run("-X", "importtime", "-m", "vitcls.config")
    assert done.returncode == 0, done.stderr
    names = [line.partition(" = ")[0] for line in done.stdout.splitlines() if line[:1].isalpha()]
    assert names == list(FIELDS)
    assert done.stdout.count("\n\n") == len({name.partition(".")[0] for name in FIELDS}) - 1
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")
    }
    assert "ml_collections" in imported and not imported & {"jax", "flax", "tensorflow"}


def test_an_unknown_argument_is_refused():
    assert run("-m", "vitcls.config", "optim").returncode == 2


def test_a_field_is_described_by_all_that_its_row_says():
    lines = describe("loss.gamma", FIELDS["loss.gamma"])
    assert lines.startswith("loss.gamma = 2.0\n    Focal loss: power of (1 - probability).")
    lines = " ".join(lines.split())
    assert "Allowed: at least 0. Needs loss.name='focal'." in lines
    assert "unset" in describe("adapt.probe_lr", FIELDS["adapt.probe_lr"])
    lines = " ".join(describe("model.remat", FIELDS["model.remat"]).split())
    assert "One of 'none', 'dots', 'full'. May change when a run is continued." in lines
