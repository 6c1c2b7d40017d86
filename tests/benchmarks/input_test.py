"""What the benchmarks of loading, start-up and all together compute, print and refuse."""

import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks import all as everything
from benchmarks import figures, input_peer, input_pipeline, jpegs, peer_process
from vitcls.errors import UserError


def summary(value):
    return figures.summary([value])


def test_random_files_are_like_those_of_imagenet(tmp_path):
    jpegs.make_folder(tmp_path / "a", 12)
    jpegs.make_folder(tmp_path / "b", 12)
    paths = sorted((tmp_path / "a").rglob("*.jpg"))
    sizes = [np.prod(Image.open(path).size) for path in paths]
    assert np.mean(sizes) == pytest.approx(202_000, rel=0.02)
    assert np.mean([path.stat().st_size for path in paths]) == pytest.approx(110e3, rel=0.05)
    for path in paths:
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_the_loader_is_measured_beside_its_limits(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a.json"
    args = ["--images=16", "--windows=2", "--window_secs=0.05", "--peers", "DataLoader"]
    monkeypatch.setattr(sys, "argv", ["input_pipeline", f"--json={path}", *args])
    input_pipeline.main()
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    speeds = result["images_per_second"]
    parts = zip(
        *(speeds[name]["windows"] for name in ("decode alone", "crop and scale alone")), strict=True
    )
    both = [1 / (1 / decode + 1 / crop) for decode, crop in parts]
    assert speeds["both, one after the other"]["windows"] == pytest.approx(both)
    turns = zip(speeds["ours"]["windows"], speeds["DataLoader"]["windows"], strict=True)
    expected = [ours / peer for ours, peer in turns]
    assert result["ratios"]["DataLoader"]["windows"] == pytest.approx(expected)
    assert f"{speeds['cache']['median']:.0f}" in printed


def test_batches_that_lie_ready_are_not_timed():
    def batches():
        for number in range(10):
            time.sleep(0.02 if number >= 6 else 0)
            yield number

    left = batches()
    assert input_peer.pull(left, 2, 6) >= 0.04
    assert next(left) == 8


def test_a_peer_answers_from_another_process():
    call = peer_process.start_process("math")
    assert call("hypot", 3, 4) == 5
    with pytest.raises(UserError, match="needs no_such_module.*-m pip install no_such_module"):
        peer_process.start_process("no_such_module")("run")
    with pytest.raises(RuntimeError, match="math.sqrt ended its process"):
        call("sqrt", -1)


def test_the_table_has_figures_and_reasons():
    step = {
        "ours": {"images_per_second": summary(2.0), "share_of_limit": 0.5},
        "peer": {
            "images_per_second": summary(1.0), "library": "x", "variant": "y",
            "versions": {"x": "1"},
        },
        "ratio": summary(2.0), "limit": {"images_per_second": 4.0}, "model": "vit_b16",
        "image_size": 224, "batch_size": 8, "dtype": "float32", "attention": "cudnn",
        "device": "cpu", "num_cpus": 2, "versions": {"jax": "0"},
    }  # fmt: skip
    train, _, *others = everything.jobs("cpu")
    text = everything.table([(train, step), (others[0], "not here: torch")])
    assert "float32, cudnn, images/s | 2 (2 to 2) | 1 (1 to 1) x y | 2 (2 to 2) | 4 | 50% |" in text
    assert "Versions: jax 0, x 1." in text
    assert "- `input_pipeline`: not here: torch" in text


def test_a_benchmark_that_fails_or_lasts_is_said(monkeypatch):
    def run(name, secs):
        return everything.run(everything.Job(name, ()), secs=secs, windows=1)

    assert run("no_such_benchmark", 60) == "failed with exit code 1, see its message"
    assert run("startup", 0.1) == "stopped: the time was over"


def test_missing_packages_are_named():
    job = everything.Job("startup", (), ("numpy", "no_such_package", "no_such.module"))
    assert everything.missing(job) == ["no_such_package", "no_such.module"]
