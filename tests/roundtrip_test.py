"""The shipped checkpoint's way out and back: `pipeline` names what `vitcls.predict` names."""

from pathlib import Path

import transformers

from vitcls.data import sources
from vitcls.export import formats
from vitcls.predict import rows as prediction

ASSET = Path(__file__).parent.parent / "assets" / "vit-nano-glyphs"


def test_pipeline_and_predict_agree_on_every_test_digit(digits_dir, tmp_path):
    split = sources.open_split("digits", "test", data_dir=digits_dir)
    paths = [tmp_path / f"{index:03}.png" for index in range(len(split))]
    for index, path in enumerate(paths):
        path.write_bytes(split.read(index)[0])
    formats.export(ASSET, format="huggingface", output=tmp_path / "exported")
    classify = transformers.pipeline(
        "image-classification", model=str(tmp_path / "exported"), top_k=1, batch_size=60
    )
    theirs = [row[0]["label"] for row in classify([str(path) for path in paths])]
    rows = prediction.predict_files(ASSET, [str(path) for path in paths])
    ours = [row["predictions"][0]["label"] for row in rows]
    assert len(ours) == 360
    assert ours == theirs
    assert len(set(ours)) >= 10  # not one class for all
    # The names mean what they say: most of the ten digits' labels are right without fine-tuning.
    labels = [split.class_names[split.read(index)[1]] for index in range(len(split))]
    assert sum(a == b for a, b in zip(ours, labels, strict=True)) > 0.7 * len(ours)
