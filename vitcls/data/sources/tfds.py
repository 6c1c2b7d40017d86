"""Random access to a split of a prepared tfds data set, without TensorFlow."""

import bisect
import concurrent.futures
import hashlib
import itertools
import json
import os

import numpy as np
import tensorflow_datasets as tfds

from vitcls.data.sources.labels import cached_labels
from vitcls.data.sources.split import Split
from vitcls.errors import StorageError, UserError, unknown
from vitcls.logs.progress import track

# Reading every label waits for the disk or the network: more threads than processors.
_NUM_THREADS = 16
_CHUNK = 1024


class TfdsSplit(Split):
    """A split, or a slice or sum of splits such as "train[:90%]+validation".

    Records are parsed by tfds, the images stay encoded.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """Opens a split.

        Args:
          builder: A builder of data on disk, as `tfds.builder_from_directory` returns it.
          split: Name or expression.

        Raises:
          UserError: No such split, an empty one, no image or label in the records, or records
            without random access.
        """
        _check_format(builder)
        self._image_key, self._label_key = _find_keys(builder.info)
        label_feature = builder.info.features[self._label_key]
        self.name = split
        self.class_names = tuple(map(label_feature.int2str, range(label_feature.num_classes)))
        files = _find_files(builder.info, split)
        self.fingerprint = _fingerprint(builder.info, files)
        self._file_names = [os.path.basename(file.filename) for file in files]
        self._skips = [file.skip for file in files]
        self._ends = list(itertools.accumulate(file.take for file in files))
        # Without the other features, such as masks, which would be decoded in vain.
        self._features = tfds.features.FeaturesDict(
            {key: builder.info.features[key] for key in (self._image_key, self._label_key)}
        )
        self._decoders = {self._image_key: tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example.

        Raises:
          StorageError: The record is damaged or gone.
        """
        try:
            record = self._records[index]
        except Exception as error:  # ArrayRecord's checksums; its types are not documented
            raise StorageError(f"Cannot read {self.id(index)}: {error}") from error
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        return example[self._image_key], int(example[self._label_key])

    def id(self, index: int) -> str:
        """The file that holds the example and its position there, as tfds names examples."""
        file = bisect.bisect_right(self._ends, index)
        start = self._ends[file - 1] if file else 0
        return f"{self._file_names[file]}__{self._skips[file] + index - start}"

    def labels(self) -> np.ndarray:
        """All labels, int32 (N,). The first call for a data set reads every record.

        Raises:
          UserError: Some examples have none, as in the test splits of competitions.
        """
        labels = cached_labels(self.fingerprint, self._read_labels)
        if labels.min() < 0:
            raise UserError(f"Split {self.name!r} has examples without a label; choose another.")
        return labels

    def _read_labels(self) -> list[int]:
        def read_chunk(start: int) -> list[int]:
            stop = min(start + _CHUNK, len(self))
            return [self.read(index)[1] for index in range(start, stop)]

        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            starts = range(0, len(self), _CHUNK)
            chunks = track(
                pool.map(read_chunk, starts), f"Labels of {self.name}", total=len(starts)
            )
            return list(itertools.chain.from_iterable(chunks))


def _check_format(builder: tfds.core.DatasetBuilder) -> None:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UserError(
            f"{builder.data_dir} was prepared as {', '.join(sorted(formats))}, which has no random "
            "access; move it away, and it is prepared again as array_record, or use another "
            "data.data_dir."
        )


def _find_keys(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Names of the features that hold the image and the label."""
    features = info.features
    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    labels = [key for key in features if getattr(features[key], "num_classes", None)]
    supervised = info.supervised_keys or ()
    # Where there are several, such as an image and its mask, the data set says which to use.
    for keys in (supervised, (*images, *labels)):
        if len(keys) == 2 and keys[0] in images and keys[1] in labels:
            return keys
    raise UserError(
        f"{info.full_name} does not have one image and one label per example, but images "
        f"{images} and labels {labels}; choose a data set for image classification."
    )


def _find_files(info: tfds.core.DatasetInfo, split: str) -> list:
    """Instructions (filename, skip, take) of the records in a split."""
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in info.splits and name != "all":
            raise unknown(f"split of {info.full_name}", name, info.splits)
    try:
        files = info.splits[split].file_instructions
    except ValueError as error:
        raise UserError(f"Not a split of {info.full_name}: {error}") from error
    if not files or any(file.take <= 0 for file in files):
        raise UserError(f"Split {split!r} of {info.full_name} has no examples.")
    return files


def _fingerprint(info: tfds.core.DatasetInfo, files: list) -> str:
    """Hash of the data set's name and version, its sizes, and the records in use."""
    content = {
        "name": info.full_name,
        "splits": {
            key: [info.splits[key].num_bytes, *info.splits[key].shard_lengths]
            for key in info.splits
        },
        "files": [[os.path.basename(file.filename), file.skip, file.take] for file in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
