"""What the benchmark of probes computes from its times, checks and refuses; not how fast it is."""

import json
import sys

import numpy as np
import pytest

from benchmarks import probe
from vitcls.probe import heads

QUICK = ["--windows=2", "--window_secs=0.01", "--examples=50", "--batch_size=20"]


def measured(monkeypatch, capsys, path, *args: str) -> tuple[dict, str]:
    monkeypatch.setattr(probe, "COPY_SIZE", 2**16)
    monkeypatch.setattr(sys, "argv", ["probe", f"--json={path}", *QUICK, *args])
    probe.main()
    return json.loads(path.read_text()), capsys.readouterr().out


def test_the_sweep_is_measured_beside_its_limit(monkeypatch, capsys, tmp_path):
    result, printed = measured(
        monkeypatch, capsys, tmp_path / "a.json",
        "--dim=6", "--classes=3", "--epochs=2", "--peer=none", "--clock=cpu",
    )  # fmt: skip
    # Two products of 2 x 48 x 6 x 3 operations in each of two epochs: 3 batches leave 2 out.
    assert result["gflop"] == pytest.approx(200 * 2 * 2 * 2 * 48 * 6 * 3 * 1e-9)
    seconds, limit = result["seconds"], result["limit"]
    products = result["gflop"] * 1e-3 / limit["tflops"]["median"]
    # Head and momentum are read and written, at 4 bytes, in each of 6 steps.
    moved = 200 * 4 * 4 * 6 * 6 * 3 * 1e-9 / limit["copy_gb_per_second"]["median"]
    assert limit["seconds"] == pytest.approx(max(products, moved))
    assert result["share_of_limit"] == pytest.approx(limit["seconds"] / seconds["ours"]["median"])
    pairs = zip(seconds["separate"]["windows"], seconds["ours"]["windows"], strict=True)
    assert result["ratio"]["windows"] == pytest.approx([alone / ours for alone, ours in pairs])
    assert result["largest_difference"] < 1e-5
    assert f"separate / one program: {result['ratio']['median']:.3g}" in printed


def test_the_gain_of_kept_features_is_that_of_all_parts(monkeypatch, capsys, tmp_path):
    result, printed = measured(
        monkeypatch, capsys, tmp_path / "a.json", "--model=vit_mu16", "--image_size=32",
    )  # fmt: skip
    head_only, once, fit = (
        result["seconds"][name]["windows"] for name in ("head_only", "extract", "probe")
    )
    gains = [a / (b + c) for a, b, c in zip(head_only, once, fit, strict=True)]
    assert result["gain"]["windows"] == pytest.approx(gains)
    assert f"{result['gain']['median'] / 90:.2f} of 90" in printed


def test_heads_that_differ_end_the_run():
    stacked = heads.Linear(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3)))
    alone = [heads.Linear(np.ones((3, 4)), np.ones(3))] * 2
    assert probe.check_heads(stacked, alone) == 0
    for wrong in (1.01, np.nan):
        changed = [alone[0], heads.Linear(np.full((3, 4), wrong), np.ones(3))]
        with pytest.raises(ArithmeticError, match="away from the one trained alone"):
            probe.check_heads(stacked, changed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dim=0"], "0 is not positive"),
        (["--model=vit_x16"], "Unknown architecture --model 'vit_x16'"),
        (["--json=no/such/folder.json"], "there is no folder no/such"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_exit_2_with_one_message(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe", *args])
    with pytest.raises(SystemExit, match="2"):
        probe.main()
    assert message in capsys.readouterr().err
