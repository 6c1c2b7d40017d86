"""scikit-learn's 1 797 handwritten digits as a tfds data set.

The folder `1.0.0` holds what preparing gives, so that a run needs neither TensorFlow nor
scikit-learn. A slow test compares it with the digits prepared anew.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
1 797 scans of handwritten digits, 8 x 8 pixels in 17 grey levels: the test part of the UCI set
"Optical Recognition of Handwritten Digits", as `sklearn.datasets.load_digits` ships it. Levels
0..16 become 0..255. The UCI data are licensed under CC BY 4.0.
"""

_CITATION = """\
@misc{alpaydin1998digits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""

_NUM, _NUM_TEST = 1797, 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """Splits `train` (1 437) and `test` (360, stratified, fixed)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        # Imported late: the class alone, which opens prepared data, does without scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        test = _test_indices(digits.target)
        return {
            "train": self._generate_examples(digits, np.setdiff1d(np.arange(_NUM), test)),
            "test": self._generate_examples(digits, test),
        }

    def _generate_examples(self, digits, indices: np.ndarray) -> Iterator[tuple[int, dict]]:
        """Yields (index into scikit-learn's arrays, example)."""
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(digits.target[index])}


def _test_indices(labels: np.ndarray) -> np.ndarray:
    """Indices of the test split, which never changes: one digit in five, stratified.

    Every (1797 / 360)-th digit when they are sorted by class and randomly within a class, by seed
    0 of NumPy's legacy generator, the one whose numbers are guaranteed to stay.
    """
    by_class = np.lexsort((np.random.RandomState(0).random_sample(_NUM), labels))
    return np.sort(by_class[np.arange(_NUM_TEST) * _NUM // _NUM_TEST])
