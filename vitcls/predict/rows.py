"""Class names and probabilities of image files: finding the files, predicting, writing rows.

H W pixels, K classes.
"""

import collections
import concurrent.futures
import contextlib
import csv
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import jax
import numpy as np

from vitcls import inference
from vitcls.data import images
from vitcls.data.sources import image_files
from vitcls.decision.rule import Rule
from vitcls.errors import UserError
from vitcls.files import written_aside
from vitcls.folders import ownership
from vitcls.logs import progress
from vitcls.step import eval_step, sharding

log = logging.getLogger("vitcls")

# {"image": path, "predictions": [{"label": ..., "probability": ...}, ...]}, likeliest first, or
# {"image": path, "error": reason}. "rejected" is added with a rule, "logits" (K,) on demand.
Row = dict[str, Any]

_NUM_LOGGED = 10  # unreadable images; the output has them all


def find_images(source: str) -> list[str]:
    """Returns the paths that `--images` names, sorted; the paths of a list keep their order.

    Args:
      source: A file; a folder, whose images are found recursively; a glob, in which ** stands for
        any folders; or `@FILE` with one path per line, relative to FILE's folder. Hidden files are
        taken only if they are named.

    Raises:
      UserError: No image is found, or a folder may not be listed.
    """
    source = os.path.expanduser(source)
    if source.startswith("@"):
        paths = _read_list(Path(source[1:]).expanduser())
    elif os.path.isdir(source):
        listing = image_files.list_images(source, is_strict=False)
        paths = [os.path.join(source, path) for path, _ in listing.images]
        if listing.unused:
            log.warning(
                "%s: %d images. Not used: %s.",
                source, len(paths), image_files.describe_unused(listing.unused),
            )  # fmt: skip
    elif os.path.exists(source):  # also a file with the name of a pattern, such as "a[1].jpg"
        paths = [source]
    else:
        paths = image_files.match_pattern(source)
    if not paths:
        raise UserError(
            f"--images={source} names no images; give a file, a folder with images, a pattern in "
            "quotes such as 'photos/**/*.jpg', or @list.txt with one path per line."
        )
    return paths


def _read_list(path: Path) -> list[str]:
    try:
        # Windows writes a byte order mark at the start of a file. It ends lines with \r\n, which
        # `read_text` translates.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--images=@{path} cannot be read as a list ({error}); write one path per line."
        ) from error
    return [os.path.join(path.parent, line) for line in lines if line.strip()]


def predict_files(
    checkpoint: str | Path,
    paths: list[str],
    *,
    top_k: int = 1,
    batch_size: int = 0,
    rule: Rule | None = None,
    keep_logits: bool = False,
) -> Iterator[Row]:
    """Loads a checkpoint, compiles, and returns one row per path, in order.

    Args:
      checkpoint: As `pretrained.load` takes it.
      paths: One image file or more. A file that cannot be read gives a row with its error.
      top_k: Number of classes in a row.
      batch_size: See `inference.compile_step`.
      rule: Calibrates probabilities and says which images are rejected; None: neither.
      keep_logits: Whether a row has the logits.

    Raises:
      UserError: The checkpoint is missing, has no classes, or has fewer than `top_k`. The iterator
        raises it if the network's answers are not finite.
    """
    model, variables, processor, mesh = inference.load_classifier(checkpoint)
    names = processor.class_names
    if not 1 <= top_k <= len(names):
        raise UserError(
            f"--top_k={top_k} is out of range: the checkpoint has {len(names)} classes. Use 1 to "
            f"{len(names)}."
        )
    answer = eval_step.make_predict_step(processor.normalise, model.apply)
    if rule is not None or keep_logits:

        def answer(variables, images):
            return model.apply(variables, processor.normalise(images), train=False)

    step, batch_size = inference.compile_step(
        jax.jit(answer, out_shardings=sharding.batch_sharding(mesh)),
        variables,
        jax.ShapeDtypeStruct((*processor.size, 3), np.uint8),
        mesh=mesh,
        num_images=len(paths),
        batch_size=batch_size,
    )

    def start(chunk: list[tuple[str, np.ndarray | str]]) -> tuple[list, jax.Array]:
        batch = np.zeros((batch_size, *processor.size, 3), np.uint8)
        for row, (_, pixels) in enumerate(chunk):
            if not isinstance(pixels, str):
                batch[row] = pixels
        return chunk, step(variables, sharding.to_global({"image": batch}, mesh)["image"])

    def rows() -> Iterator[Row]:
        pixels = _decode_ahead(paths, processor.pixels, num_ahead=2 * batch_size)
        chunks = iter(lambda: list(itertools.islice(pixels, batch_size)), [])
        # The next batch is sent to the devices before this one's result is awaited.
        for (chunk, result), _ in itertools.pairwise(itertools.chain(map(start, chunks), [None])):
            answers = np.asarray(result)[: len(chunk)]
            shown = [row for row, (_, found) in enumerate(chunk) if not isinstance(found, str)]
            inference.check_answers(answers[shown], [chunk[row][0] for row in shown].__getitem__)
            for row, (path, found) in enumerate(chunk):
                if isinstance(found, str):
                    yield {"image": path, "error": found}
                else:
                    yield {"image": path} | describe(answers[row])

    def describe(answer: np.ndarray) -> Row:
        if rule is None and not keep_logits:
            return {"predictions": _top(answer, names, top_k)}
        chosen, row = rule or Rule(), {"logits": answer} if keep_logits else {}
        probabilities = chosen.probabilities(answer[None])[0].astype(np.float32)
        row["predictions"] = _top(probabilities, names, top_k)
        if rule is not None:
            row["rejected"] = not rule.is_answered(answer[None])[0]
        return row

    return rows()


def _decode_ahead(
    paths: Iterable[str], transform: Callable[..., np.ndarray], *, num_ahead: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields each path with its pixels or its error; decodes in threads."""

    def decode(path: str) -> tuple[str, np.ndarray | str]:
        try:
            with open(path, "rb") as file:
                return path, transform(images.decode(file.read()))
        except images.ImageError as error:
            return path, str(error)
        except OSError as error:
            return path, f"Cannot be read: {error.strerror}."

    pool = concurrent.futures.ThreadPoolExecutor(inference.NUM_THREADS)
    pending = collections.deque()
    try:
        for path in paths:
            pending.append(pool.submit(decode, path))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _top(probabilities: np.ndarray, names: tuple[str, ...], top_k: int) -> list[dict[str, Any]]:
    """The likeliest classes; ties in the order of the classes."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    # The text of a float32 is the shortest decimal number with its value.
    return [{"label": names[i], "probability": float(str(probabilities[i]))} for i in order]


def check_output(output: str) -> None:
    """Raises `UserError` if `write_rows` could not write there."""
    if output == "-":
        return
    path = Path(output)
    if path.suffix not in (".csv", ".jsonl", ".npz"):
        raise UserError(
            f"--output={output} must end in .csv, .jsonl or .npz, or be - for CSV here."
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(
            f"--output={output} is a folder, or its folder does not exist; name a file."
        )
    is_own = {
        ".csv": lambda: ownership.has_text(path, "image,label", at_start=True),
        ".jsonl": lambda: ownership.has_keys(path, "image"),
        ".npz": lambda: ownership.has_text(path, "logits.npy"),
    }[path.suffix]
    ownership.check_file("--output", path, is_own=is_own)


def write_rows(rows: Iterable[Row], output: str, *, top_k: int, num_rows: int) -> tuple[int, int]:
    """Writes CSV, JSON lines or npz, by the suffix, and reports images that cannot be read.

    The file appears when it is complete.

    Args:
      rows: From `predict_files`, with logits for npz.
      output: A path, or "-" for CSV to standard output.
      top_k: Number of classes in a row.
      num_rows: Number of rows.

    Returns:
      The number of images that cannot be read, and the number of those that are rejected.

    Raises:
      UserError: No image can be read.
    """
    # A progress bar would be drawn between rows that go to the same terminal.
    if output != "-":
        rows = progress.track(rows, "predict", total=num_rows)
    num_bad = num_rejected = 0
    with _whole_file(output) as file, contextlib.ExitStack() as at_end:
        if output.endswith(".npz"):
            write = at_end.enter_context(_npz_writer(file.buffer))
        else:
            write = _jsonl_writer(file) if output.endswith(".jsonl") else _csv_writer(file, top_k)
        for row in rows:
            write(row)
            num_rejected += row.get("rejected", False)
            if "error" in row:
                num_bad += 1
                if num_bad <= _NUM_LOGGED:
                    log.warning("%s: %s", row["image"], row["error"])
        if num_bad == num_rows:
            raise UserError(
                f"None of the {num_rows} images can be read, such as {row['image']}: {row['error']}"
            )
    return num_bad, num_rejected


@contextlib.contextmanager
def _whole_file(output: str) -> Iterator[TextIO]:
    """Yields a file that is renamed to `output` on success and deleted on failure."""
    # File names may be any bytes. They are written unchanged.
    escape = "surrogateescape"
    if output == "-":
        # The bytes are those of a file, regardless of the terminal's encoding.
        sys.stdout.reconfigure(encoding="utf-8", errors=escape)
        yield sys.stdout
        return
    with (
        written_aside(Path(output)) as aside,
        aside.open("w", encoding="utf-8", errors=escape, newline="") as file,
    ):
        yield file


@contextlib.contextmanager
def _npz_writer(file: BinaryIO) -> Iterator[Callable[[Row], Any]]:
    """Yields a function of rows; at the end writes `logits` float32 (N, K) and `ids` (N,)."""
    rows = []
    yield lambda row: rows.append(row) if "error" not in row else None
    # The text would need the error handler of file names, which numpy lacks.
    ids = np.array([row["image"].encode("utf-8", "replace").decode() for row in rows])
    np.savez_compressed(file, logits=np.array([row["logits"] for row in rows], np.float32), ids=ids)


def _jsonl_writer(file: TextIO) -> Callable[[Row], Any]:
    return lambda row: file.write(json.dumps(row) + "\n")


def _csv_writer(file: TextIO, top_k: int) -> Callable[[Row], Any]:
    writer = csv.writer(file, lineterminator="\n")
    ranks = [""] if top_k == 1 else [f"_{rank}" for rank in range(1, top_k + 1)]
    columns = [name + rank for rank in ranks for name in ("label", "probability")]
    writer.writerow(["image", *columns, "error"])

    def write(row: Row) -> None:
        found = row.get("predictions", [{}] * top_k)
        # An empty label cannot be mistaken for a class, whose name may be "rejected".
        if row.get("rejected"):
            found = [{"probability": one["probability"]} for one in found]
        cells = [cell for one in found for cell in (one.get("label"), one.get("probability"))]
        writer.writerow([row["image"], *cells, row.get("error")])

    return write
