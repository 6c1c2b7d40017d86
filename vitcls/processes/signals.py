"""Signals that stop a run: at once if nothing is lost, otherwise between two steps."""

import contextlib
import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import FrameType

from vitcls.errors import Interrupted

# HUP says that the terminal was closed. USR1 and USR2 are what clusters send, on demand, some time
# before they end a job.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# `nohup`, and shells for background jobs, start a process with these ignored. They stay ignored.
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)


def heeded(numbers: tuple[int, ...] = STOPS) -> list[int]:
    """Returns those of the signals that this process is to heed."""
    return [
        number
        for number in numbers
        if number not in _MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN
    ]


def leave_terminal() -> None:
    """Discards all further output if its terminal was closed."""
    # Otherwise every write would be an error, also after the run has saved.
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def exit_on_signal() -> None:
    """Makes signals end the command, with the exit code that says: run it again.

    This is for the time before and after training, when there is nothing to save.
    """

    def end(number: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt this exit.
        ignore()
        _say(f"{_name(number)}: stopped outside of training; run the same command again.")
        sys.exit(Interrupted.exit_code)

    for number in heeded():
        signal.signal(number, end)


def ignore() -> None:
    """Ignores signals in a process that ends; a second Ctrl-C still kills it."""
    for number in heeded():
        is_second = number == signal.SIGINT
        signal.signal(number, signal.SIG_DFL if is_second else signal.SIG_IGN)


class StopRequest:
    """While entered, signals are only noted, for `poll`; but a second SIGINT ends the process.

    Nothing is raised, because that would lose a checkpoint that is being written. Other signals may
    repeat: clusters send a SIGTERM after the signal that was asked for.

    Attributes:
      name: The signal that `poll` knows of; None: none.
      is_all_saved: Whether a signal may end the process at once; the training loop sets it.
    """

    def __init__(
        self,
        vote: Callable[[int], int] = int,
        leave: Callable[[int, str], None] = lambda code, message: None,
    ):
        """Takes `distributed.late_maximum`'s result and `distributed.leave` for several processes.

        Args:
          vote: Makes one number of those of all processes.
          leave: Ends all processes, given a code and a message.
        """
        self.name: str | None = None
        self.is_all_saved = False
        self._number = 0
        self._vote, self._leave = vote, leave
        self._previous = {}

    def poll(self) -> str | None:
        """Returns `name`. All processes must call it equally often, and then agree on it."""
        number = self._vote(self._number)
        if self.name is None and number:
            self.name = _name(number)
        return self.name

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in heeded()}
        # Python calls a handler only when the main thread is back in Python. During compilation
        # that may take minutes. The signal's number is in this pipe at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[reader], name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(-1)
        # Closing the pipe ends the thread.
        os.close(self._writer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # The run prints once it knows of the stop, so the output must be safe before.
        leave_terminal()
        self._number = self._number or number

    def _listen(self, reader: int) -> None:
        is_told = is_interrupted = False
        while byte := os.read(reader, 1):
            number = byte[0]
            if number not in STOPS:
                continue
            if number == signal.SIGINT and is_interrupted:
                os._exit(128 + number)
            is_interrupted |= number == signal.SIGINT
            if is_told:
                continue
            is_told = True
            self._note(number, None)
            if self.is_all_saved:
                message = f"{_name(number)}: nothing to save; run the same command again."
                _say(message)
                self._leave(Interrupted.exit_code, message)
                os._exit(Interrupted.exit_code)
            _say(f"{_name(number)}: saving, then stopping; a second Ctrl-C stops at once.")
        os.close(reader)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(text: str) -> None:
    leave_terminal()
    # A closed pipe must not stop the run. `os.write` is used because a handler may interrupt a
    # `print`, which cannot be entered again.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
