"""Speed counts training only, and says how much of it was waiting. No long work is silent."""

import logging
import time

import pytest

from vitcls.logs import progress
from vitcls.logs.progress import Progress

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


@pytest.fixture
def lines(monkeypatch, caplog):
    """The log's lines; it may be silent for a twentieth of a second."""
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    monkeypatch.setattr(progress, "LINE_SECS", 0.05)
    caplog.set_level("INFO", "vitcls")
    return lambda: [record.message for record in caplog.records]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_long_work_is_never_silent_not_even_within_one_item(lines):
    items = progress.track(iter("abcd"), "Decoding train", total=4)
    assert next(items) == "a"
    wait_until(lambda: "Decoding train: 0 of 4 in 00:00." in lines())
    assert next(items) == "b"
    wait_until(lambda: any(line.startswith("Decoding train: 1 of 4, 00:") for line in lines()))
    assert [*items] == ["c", "d"]
    num_lines = len(lines())
    time.sleep(0.2)
    assert len(lines()) == num_lines  # it has ended
    unknown = progress.track(iter("ab"), "rows")
    next(unknown)
    wait_until(lambda: "rows: 0 of ? in 00:00." in lines())
    unknown.close()
    assert not progress._DOING


def test_the_innermost_work_is_named_and_only_in_silence(monkeypatch, lines):
    monkeypatch.setattr(progress, "_start_talking", lambda: None)
    seconds = [0.0]  # since the last line
    monkeypatch.setattr(progress, "silence", lambda: seconds[0])
    monkeypatch.setattr(progress, "LINE_SECS", 30.0)
    progress.say_if_silent()
    with progress.doing("vitcls.probe"), progress.doing(lambda: "Fitting 3 of 5."):
        seconds[0] = 29.0
        progress.say_if_silent()
        assert lines() == []
        seconds[0] = 31.0
        progress.say_if_silent()
        assert lines() == ["Fitting 3 of 5."]
    with progress.doing("vitcls.probe"):
        progress.say_if_silent()
    assert lines()[1:] == ["vitcls.probe: 00:00 so far."]
    seconds[0] = 99.0
    progress.say_if_silent()
    assert len(lines()) == 2


def test_a_line_of_any_kind_ends_the_silence():
    progress._last_line -= 100
    assert progress.silence() > 99
    logging.getLogger("vitcls").warning("news")
    assert progress.silence() < 10


def test_training_between_two_reports_is_not_silent(lines):
    with Progress(7, 10, global_batch_size=4) as training:
        training.step_done()
        wait_until(lambda: "step 8/10." in lines())


def test_a_terminal_has_bars_in_place_of_lines(monkeypatch, lines, capsys):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    with progress.doing("vitcls.probe"):
        assert not progress._DOING
        for _ in progress.track(range(3), "Decoding train"):
            time.sleep(0.1)
    assert lines() == [] and "Decoding train" in capsys.readouterr().err
