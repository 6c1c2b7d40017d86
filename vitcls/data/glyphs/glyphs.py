"""The data set `glyphs`: letters and digits of many fonts, distorted, as 8x8 grey images."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from vitcls.data.glyphs import fonts, outlines, render

# Class name -> the characters it is drawn with. 62 characters make 46 classes: stretched to one
# box, a small letter that differs from its capital in size only becomes it (so the merges of the
# "balanced" set of G. Cohen et al., "EMNIST: an extension of MNIST to handwritten letters", 2017),
# O becomes a zero, and I and l a one. EMNIST keeps letters and digits apart, and joins i to I.
CLASSES: dict[str, tuple[str, ...]] = {
    **{digit: (digit,) for digit in "2345689"},
    "0": ("0", "O", "o"),
    "1": ("1", "I", "l"),
    "7": ("7", outlines.CROSSED_SEVEN),
    **{letter: (letter,) for letter in "ABDEFGHLNQRT"},
    **{letter.upper(): (letter.upper(), letter) for letter in "cjkmpsuvwxyz"},
    **{letter: (letter,) for letter in "abdefghinqrt"},
}
CLASS_NAMES = tuple(sorted(CLASSES))  # digits, capitals, small letters

IMAGES_PER_CLASS = {"train": 1800, "test": 90}
SEED = 0

_DESCRIPTION = """\
Letters and digits of free fonts, bent, drawn with pens of many widths, and brought to 8 x 8 pixels
in 17 grey levels as scikit-learn's handwritten digits were; 46 classes. The test split is drawn
with fonts that the train split has nothing of.
"""


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Splits `train` (82 800) and `test` (4 140). Needs fonts (`make fonts`), but no network."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        fonts.locate()  # before any work: the fonts may be missing
        return {split: self._generate_examples(split) for split in IMAGES_PER_CLASS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        shapes = read_shapes(held_out=split == "test")
        for index in range(IMAGES_PER_CLASS[split] * len(CLASS_NAMES)):
            image, label = draw(shapes, index, split=split)
            yield index, {"image": image[..., None], "label": label}


def read_shapes(*, held_out: bool) -> tuple[tuple[outlines.Glyph, ...], ...]:
    """Every glyph of every font of a split, by class number: in the order of the font table."""
    shapes = []
    files = {p: paths for p, paths in fonts.locate().items() if p.held_out == held_out}
    for name in CLASS_NAMES:
        glyphs = (
            outlines.read_glyph(path, character)
            for package, paths in files.items()
            for path in paths
            for character in CLASSES[name]
            if not (package.capitals_only and character.islower())
        )
        shapes.append(tuple(glyph for glyph in glyphs if glyph is not None))
    return tuple(shapes)


def draw(
    shapes: tuple[tuple[outlines.Glyph, ...], ...], index: int, *, split: str, seed: int = SEED
) -> tuple[np.ndarray, int]:
    """Image number `index` of a split, a pure function of the arguments.

    Args:
      shapes: Glyphs by class number.
      index: Number of the image; classes take turns.
      split: "train" or "test".
      seed: Another one gives another data set.

    Returns:
      uint8 (8, 8) and the class number.
    """
    stream = sorted(IMAGES_PER_CLASS).index(split)
    rng = np.random.default_rng([seed, stream, index])
    label = index % len(shapes)
    glyph = shapes[label][rng.integers(len(shapes[label]))]
    return render.render(glyph, rng), label
