"""Shows the progress of trials: lines that are overwritten on a terminal, or log lines."""

import logging

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from launch.trials import Trial
from vitcls.logs.progress import on_terminal

log = logging.getLogger("vitcls")


class Screen:
    """Lines at the bottom of a terminal that are overwritten; without a terminal nothing."""

    def __init__(self, num_lines: int):
        self._bars, self._redirect = [], None
        if on_terminal():
            self._bars = [
                tqdm(bar_format="{desc}", position=row, leave=False, dynamic_ncols=True)
                for row in range(num_lines)
            ]
            self._redirect = logging_redirect_tqdm(loggers=[log])
            self._redirect.__enter__()

    def show(self, lines: list[str]) -> None:
        for row, bar in enumerate(self._bars):
            bar.set_description_str(lines[row] if row < len(lines) else "")

    def close(self) -> None:
        for bar in self._bars:
            bar.close()
        if self._redirect is not None:
            self._redirect.__exit__(None, None, None)


def progress_line(trial: Trial) -> str:
    """Returns the progress of a running trial."""
    metrics = trial.metrics()
    if not metrics:
        return f"  {trial.name}: starting"
    speed = metrics.get("train/images_per_second")
    return (
        f"  {trial.name}: step {metrics['step']}/{trial.total_steps()}, "
        f"loss {metrics['train/loss']:.4f}" + (f", {speed:.1f} images/s" if speed else "")
    )


def log_end(trial: Trial, state: str, code: int | None = None) -> None:
    """Logs that a trial has ended, its state and its last message."""
    with_code = "" if code in (None, 0) else f" with code {code}"
    level = logging.WARNING if state == "failed" else logging.INFO
    log.log(level, "%s: %s%s: %s", trial.name, state, with_code, trial.last_words())
