"""The list of images that a run skips, and the limit on their number."""

import contextlib
import json
import logging
import os
from pathlib import Path

from vitcls.data.sources.split import Split, check_no_class_is_empty
from vitcls.errors import UserError
from vitcls.folders import lock

log = logging.getLogger("vitcls")

_NUM_LOGGED = 10  # of each split; the file has them all
# Size of a random sample of a split from which on it shows that more than half is bad.
_MIN_SAMPLED = 1000

BadImage = tuple[str, str]  # the example's id, and why it cannot be used


class Skipped:
    """The list in a file, one line of JSON per image: `split`, `id` and `reason`.

    Every image is listed once, even if several threads, processes or continued runs meet it. The
    file is locked while it is read and added to.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, set[str]] = {}
        self._end = 0  # of the lines that are known
        self._num_sampled = self._num_bad_sampled = 0
        if path.exists():
            self._add_lines("", [])

    def count(self, split: str) -> int:
        """Number of different images of a split in the list."""
        return len(self._known.get(split, ()))

    def check_classes(self, split: Split) -> None:
        """Raises `UserError` if all images of a class are in the list, also by other processes."""
        self._add_lines("", [])
        if self.count(split.name):
            check_no_class_is_empty(split, without=self._known[split.name])

    def log_counts(self, splits: list[Split]) -> None:
        """Logs how many images of each split are in the list, also by other processes."""
        self._add_lines("", [])
        for split in splits:
            log.info(
                "%s: %d of %d images skipped%s",
                split.name, self.count(split.name), len(split),
                f", see {self._path}." if self.count(split.name) else ".",
            )  # fmt: skip

    def add(self, split: Split, bad: tuple[BadImage, ...], *, num_sampled: int = 0) -> None:
        """Adds the images that are not in the list yet.

        Args:
          split: The images' split.
          bad: Images that cannot be used.
          num_sampled: Size of the random sample that contained `bad`; 0: not a random sample.

        Raises:
          UserError: More than half of the split, or of a large sample of it, cannot be used.
        """
        self._num_sampled += num_sampled
        if not bad:
            return
        before = self.count(split.name)
        new = [
            (name, reason)
            for name, reason in dict(bad).items()
            if name not in self._known.get(split.name, ())
        ]
        if new:
            self._add_lines(split.name, new)
        for name, reason in new[: max(0, _NUM_LOGGED - before)]:
            log.warning("Skipping %s of split %r: %s", name, split.name, reason)
        count = self.count(split.name)
        if before < _NUM_LOGGED <= count:
            log.warning("Images that are skipped from here on are listed in %s only.", self._path)
        if num_sampled:
            self._num_bad_sampled += len(bad)
        is_sample_bad = (
            self._num_sampled >= _MIN_SAMPLED and self._num_bad_sampled * 2 > self._num_sampled
        )
        if 2 * count > len(split) or (num_sampled and is_sample_bad):
            raise UserError(
                f"More than half of the {len(split)} images in {split.name!r} cannot be used, "
                f"such as {bad[0][0]}: {bad[0][1]} {count} are listed in {self._path}."
            )

    def _add_lines(self, split: str, new: list[BadImage]) -> None:
        """Reads what other processes added, then adds what is still missing."""
        with self._path.open("a+b") as file:
            lock.wait_for(file)  # until it is closed
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):  # cut by a full disk
                    file.truncate(self._end)
                    break
                self._end += len(line)
                # Without locks, processes may have overwritten each other's lines.
                with contextlib.suppress(ValueError, KeyError):
                    entry = json.loads(line)
                    self._known.setdefault(entry["split"], set()).add(entry["id"])
            known = self._known.setdefault(split, set())
            lines = b"".join(
                json.dumps({"split": split, "id": name, "reason": reason}).encode() + b"\n"
                for name, reason in new
                if name not in known
            )
            file.write(lines)
            file.flush()
            self._end = os.fstat(file.fileno()).st_size
            known.update(name for name, _ in new)
