"""Batches of uint8 images from a split, read and transformed in threads or worker processes.

Shapes: `B` rows of the global batch, `b` those of this process, `H W` pixels, `K` classes. A
batch is a dict of

  image    uint8 (b, H, W, 3)
  targets  float32 (b, K), one-hot; zeros where the mask is 0
  mask     float32 (b,), 0 for rows that only fill up the batch, and for skipped images
  index    int32 (b,), position in the split; -1 for rows that only fill up the batch

and a pure function of its number. Grain, which runs ahead in threads and processes, only decides
where and when it is made.
"""

import atexit
import contextlib
import dataclasses
import itertools
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags
from PIL import Image

from vitcls.data import images, order
from vitcls.data.skipped import BadImage, Skipped
from vitcls.data.sources.split import Split
from vitcls.errors import UserError
from vitcls.processes.signals import STOPS

Batch = dict[str, np.ndarray]

# More threads only wait for Python's lock: on two processors 8 are a fifth slower than 4.
_PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
_MAX_THREADS = 2 * len(_PROCESSORS)


def train_batches(
    split: Split,
    *,
    global_batch_size: int,
    start_step: int,
    total_steps: int,
    seed: int,
    transform: Callable[[Image.Image, np.random.Generator], np.ndarray],
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    sampling: str = "uniform",
    skipped: Skipped | None = None,
) -> Iterator[Batch]:
    """This process' rows of the batches of steps [start_step, total_steps).

    Every epoch shows every example once, in its own order. A batch may span two epochs. With
    another `sampling`, examples are sampled by class instead, with replacement. Starting at
    a later step costs nothing and gives the same batches from there on.

    Args:
      split: The examples.
      global_batch_size: B, over all processes.
      start_step: Number of steps already taken.
      total_steps: Step at which the run ends.
      seed: Decides the order and the transforms.
      transform: Image (RGB) and the sample's generator to uint8 (H, W, 3); picklable.
      num_threads: Batches prepared concurrently, per worker if there are workers; capped at two per
        CPU. 0: no prefetching.
      num_workers: Worker processes; 0: threads of this process only.
      process_index: Which of the processes this one is.
      process_count: Processes that share the global batch, evenly.
      sampling: "uniform", or "sqrt" or "balanced", see `order.cumulative_weights`.
      skipped: List of images that cannot be decoded. Their rows are black with mask 0; all other
        rows stay the same. None: such an image is an error.

    Raises:
      UserError: The batch cannot be divided; while iterating: an image, or more than half of those
        that may be skipped, cannot be decoded, or a label is not a class.
    """
    source = _TrainSource(
        split,
        layout=_Layout(global_batch_size, process_index, process_count),
        transform=transform,
        start_step=start_step,
        num_batches=total_steps - start_step,
        seed=seed,
        cumulative_weights=_cumulative_weights(split, sampling),
    )
    return _iterate(source, skipped, num_threads=num_threads, num_workers=num_workers)


def train_ids(
    split: Split, step: int, *, global_batch_size: int, seed: int, sampling: str
) -> list[str]:
    """Returns the ids of the B images of a training step, counted from 1, over all processes.

    Args: as for `train_batches`.
    """
    source = _TrainSource(
        split,
        layout=_Layout(global_batch_size, 0, 1),
        transform=np.asarray,  # not called for ids
        start_step=step - 1,
        num_batches=1,
        seed=seed,
        cumulative_weights=_cumulative_weights(split, sampling),
    )
    return [split.id(index) for index in source.samples(0)[1].tolist()]


def eval_batches(
    split: Split,
    *,
    global_batch_size: int,
    transform: Callable[[Image.Image], np.ndarray],
    num_threads: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skipped: Skipped | None = None,
) -> "EvalBatches":
    """This process' rows of one pass over the split, in its order.

    The number of batches is the same on every process; the rows after the last example are black
    images with mask 0.

    Args and Raises: as for `train_batches`, but `transform` takes the image only.
    """
    source = _EvalSource(
        split,
        layout=_Layout(global_batch_size, process_index, process_count),
        transform=transform,
        num_batches=-(-len(split) // global_batch_size),
    )
    return EvalBatches(source, skipped, num_threads=num_threads, num_workers=num_workers)


class EvalBatches:
    """One pass over a split, each time it is iterated."""

    def __init__(
        self, source: "_Source", skipped: Skipped | None, *, num_threads: int, num_workers: int
    ):
        self._source = source
        self._skipped = skipped
        self._loading = dict(num_threads=num_threads, num_workers=num_workers)

    def __len__(self) -> int:
        """Number of batches, the same on every process."""
        return len(self._source)

    def __iter__(self) -> Iterator[Batch]:
        return _iterate(self._source, self._skipped, **self._loading)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The rows of each global batch that this process makes."""

    global_batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        self.sample_numbers(0)  # raises for a batch that cannot be divided

    def sample_numbers(self, step: int) -> np.ndarray:
        return order.sample_numbers(step, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Random access to batches, as Grain's sources have it. Picklable."""

    split: Split
    layout: _Layout
    transform: Callable[..., np.ndarray]
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches


@dataclasses.dataclass(frozen=True)
class _TrainSource(_Source):
    """Batches of steps start_step, start_step + 1, ..."""

    start_step: int
    seed: int
    cumulative_weights: np.ndarray | None

    def samples(self, batch_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of a batch's samples and the examples that they show, int64 (b,) each."""
        numbers = self.layout.sample_numbers(self.start_step + batch_number)
        if self.cumulative_weights is None:
            indices = order.example_indices(numbers, num_examples=len(self.split), seed=self.seed)
        else:
            indices = order.sampled_indices(
                numbers, cumulative_weights=self.cumulative_weights, seed=self.seed
            )
        return numbers, indices

    def __getitem__(self, batch_number: int) -> Batch:
        numbers, indices = self.samples(batch_number)

        def transform(image: Image.Image, row: int) -> np.ndarray:
            return self.transform(image, order.sample_rng(self.seed, int(numbers[row])))

        return _make_batch(self.split, indices, transform)


def _cumulative_weights(split: Split, sampling: str) -> np.ndarray | None:
    if sampling == "uniform":
        return None
    return order.cumulative_weights(split.labels(), sampling=sampling)


@dataclasses.dataclass(frozen=True)
class _EvalSource(_Source):
    """Batches of the split's examples in order, the last filled up."""

    def __getitem__(self, batch_number: int) -> Batch:
        numbers = self.layout.sample_numbers(batch_number)
        indices = np.where(numbers < len(self.split), numbers, -1)
        return _make_batch(self.split, indices, lambda image, row: self.transform(image))


def _make_batch(
    split: Split,
    indices: np.ndarray,
    transform: Callable[[Image.Image, int], np.ndarray],
) -> Batch:
    """Reads, decodes and transforms the examples at `indices` (b,); -1 leaves a row black.

    An image that cannot be used also leaves its row black, with mask 0, and is named. Grain does
    not survive exceptions in its workers well, and only the consumer can decide what to do.

    Args:
      split: The examples.
      indices: Integers (b,).
      transform: Image (RGB) and row to uint8 (H, W, 3).

    Returns:
      A batch, with the additional entries "errors", a tuple of messages, "bad", a tuple of
      `BadImage`, and "dim", the ids of images for `Split.warn_of_dim`.
    """
    blank = transform(Image.new("RGB", (1, 1)), 0)  # black, and tells the shape
    batch = {
        "image": np.zeros((len(indices), *blank.shape), np.uint8),
        "targets": np.zeros((len(indices), len(split.class_names)), np.float32),
        "mask": np.zeros(len(indices), np.float32),
        "index": np.full(len(indices), -1, np.int32),
    }
    errors, bad, dim = [], [], []
    for row, index in enumerate(indices.tolist()):
        if index < 0:
            continue
        batch["index"][row] = index
        try:
            image, label = _read(split, index)
            pixels = transform(image, row)
        except images.ImageError as error:
            bad.append((split.id(index), str(error)))
            continue
        except UserError as error:
            errors.append(str(error))
            continue
        if images.is_dim(image):
            dim.append(split.id(index))
        batch["image"][row] = pixels
        batch["targets"][row, label] = 1
        batch["mask"][row] = 1
    return batch | {"errors": tuple(errors), "bad": tuple(bad), "dim": tuple(dim)}


def _read(split: Split, index: int) -> tuple[Image.Image, int]:
    """One example's image and label, an `ImageError`, or a `UserError` that names the example."""
    image, label = split.image(index)
    num_classes = len(split.class_names)
    if not 0 <= label < num_classes:
        raise UserError(
            f"Example {split.id(index)} of split {split.name!r} has label {label}, not one of the "
            f"{num_classes} classes 0..{num_classes - 1}; choose a split with labels."
        )
    return image, label


def _iterate(
    source: _Source, skipped: Skipped | None, *, num_threads: int, num_workers: int
) -> Iterator[Batch]:
    """Batches in order, made ahead of time. Closing the iterator ends the workers."""
    num_threads = min(num_threads, _MAX_THREADS)
    # Two more than the threads, so that one slow batch does not stop them.
    buffer_size = num_threads + 2 if num_threads else 0
    dataset = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    )
    if num_workers:
        # In library use no command has parsed absl's flags. Grain passes its own to the workers.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_end_with_parent
        )
    iterator = iter(dataset)
    if num_workers:
        # After an error in a notebook, for example, the iterator is never closed otherwise.
        atexit.register(iterator.close)
    try:
        with _holding_back_signals() if num_workers else contextlib.nullcontext():
            first = list(itertools.islice(iterator, 1))
        for batch in itertools.chain(first, iterator):
            _unlink(batch)
            errors, bad, dim = (batch.pop(name) for name in ("errors", "bad", "dim"))
            if errors:
                raise UserError(errors[0])
            if dim:
                source.split.warn_of_dim(dim[0])
            _take_note(source, bad, skipped, num_rows=len(batch["index"]))
            yield batch
    finally:
        iterator.close()
        atexit.unregister(iterator.close)


def _unlink(batch: Batch) -> None:
    """Unlinks the shared memory of a worker's arrays; it lasts as long as they do.

    Grain would unlink it when an array is deleted, in another thread, for which a process that ends
    does not wait.
    """
    for array in batch.values():
        if (memory := getattr(array, "shm", None)) is not None:
            memory.unlink()
            memory.unlink = lambda: None


def _take_note(
    source: _Source, bad: tuple[BadImage, ...], skipped: Skipped | None, *, num_rows: int
) -> None:
    if skipped is not None:
        is_random = isinstance(source, _TrainSource)
        skipped.add(source.split, bad, num_sampled=num_rows if is_random else 0)
    elif bad:
        name, reason = bad[0]
        raise UserError(
            f"Example {name} of split {source.split.name!r} cannot be used: {reason} Fix it or "
            "take it out of the data set. Training and vitcls.evaluate can continue without it: "
            "data.on_error='skip' and --on_error=skip."
        )


@contextlib.contextmanager
def _holding_back_signals() -> Iterator[None]:
    """Workers started meanwhile never see a signal; this thread sees it afterwards.

    A cluster signals the whole group, but this process needs its batches until it has saved.
    Blocking is inherited by threads and processes, and so leaves no gap as a worker's own code
    would, which comes seconds after its start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    # Its start unblocks some of them again: it must not come along with the first worker's.
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Called in each worker: ends it when the process that started it ends, however that does.

    Linux could send a signal, but it does so already when the thread ends that started the worker:
    at the end of a pass, before the worker has let go of its shared memory.
    """
    del worker_index, worker_count
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()
    # Else a worker that is closed makes all batches that its threads have been asked for. Its
    # queues, which have priority -5, are emptied before.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
