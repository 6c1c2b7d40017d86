"""Speed counts training only, and says how much of it was waiting."""

import time

import pytest

from vitcls.progress import Progress

METRICS = {"train/loss": 1.0}


def test_first_step_and_pauses_do_not_count():
    with Progress(0, 10, global_batch_size=4) as progress:
        time.sleep(0.3)  # compilation
        progress.step_done()
        assert progress.images_per_second() is None
        with progress.paused():
            time.sleep(0.3)  # evaluation
        with progress.waiting():
            time.sleep(0.05)
        time.sleep(0.05)
        progress.step_done()
    assert 4 / 0.3 < progress.images_per_second() <= 4 / 0.1
    report = progress.report(2, METRICS)
    assert report["train/images_per_second"] == pytest.approx(progress.images_per_second())
    assert 0.15 < report["train/waiting"] < 0.85


def test_plain_lines_without_a_terminal(caplog):
    import logging

    logging.getLogger("vitcls").propagate = True
    with caplog.at_level("INFO", logger="vitcls"), Progress(0, 10, global_batch_size=4) as progress:
        progress.step_done()
        assert progress.report(1, METRICS) == {}  # the first step says nothing of the others
        assert "left" not in caplog.text
        progress.step_done()
        progress.report(2, METRICS)
    assert "step 1/10: loss 1.0000\n" in caplog.text
    assert "step 2/10: loss 1.0000, " in caplog.text
    assert "images/s" in caplog.text and "left" in caplog.text
