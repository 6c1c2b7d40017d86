"""Predictions are those of `transformers`' pipeline, whatever files they are asked of."""

import csv
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from overflow import MESSAGE, overflowing
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests import forked
from vitcls.decision.rule import Rule
from vitcls.errors import UserError
from vitcls.predict import rows as prediction

ROOT = Path(__file__).parents[2]
NAMES = ("ant", "bee", "cat, domestic", 'the "dog"', "eel", "fox")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random network that is sure of its answers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8, id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5 * torch.randn_like(param))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of several sizes and modes, in folders, and beside them what is no image."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    rng = np.random.default_rng(0)
    for number, (path, mode) in enumerate(
        {
            "wide, [1].png": "RGB",
            "grey.jpg": "L",
            "more/palette.gif": "P",
            "more/deep/print.jpeg": "CMYK",
            "more/deep/bits.bmp": "1",
            ".hidden/no.png": "RGB",
        }.items()
    ):
        darkest = 50 * (number % 5)  # or all would be noise of the same colour
        shape = (9 + 7 * number, 40 - 5 * number, 3)
        pixels = rng.integers(darkest, darkest + 50, shape, np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / path)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(root / "turned.jpg", exif=turned)
    (root / "notes.txt").write_text("no image")
    return root


ALL = [
    "grey.jpg", "more/deep/bits.bmp", "more/deep/print.jpeg", "more/palette.gif", "turned.jpg",
    "wide, [1].png",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(checkpoint, photos) -> list[list[dict]]:
    """What the pipeline says of each of `ALL`."""
    pipeline = transformers.pipeline(
        "image-classification",
        model=str(checkpoint),
        image_processor=ViTImageProcessorPil.from_pretrained(checkpoint),
        device="cpu",
    )
    return [pipeline(str(photos / name), top_k=3) for name in ALL]


@pytest.mark.parametrize("batch_size", [0, 8])
def test_predictions_are_the_pipelines(checkpoint, photos, expected, batch_size):
    paths = [str(photos / name) for name in ALL] * 3
    rows = list(prediction.predict_files(checkpoint, paths, top_k=3, batch_size=batch_size))
    assert [row["image"] for row in rows] == paths
    assert len({row["predictions"][0]["label"] for row in rows}) > 1
    for row, theirs in zip(rows, expected * 3, strict=True):
        assert [one["label"] for one in row["predictions"]] == [one["label"] for one in theirs]
        assert [one["probability"] for one in row["predictions"]] == pytest.approx(
            [one["score"] for one in theirs], abs=1e-5
        )


def test_what_images_names(photos, tmp_path, monkeypatch):
    paths = [str(photos / name) for name in ALL]
    assert prediction.find_images(str(photos)) == paths
    assert prediction.find_images(f"{photos}/**/*.*") == sorted([*paths, f"{photos}/notes.txt"])
    assert prediction.find_images(f"{photos}/*/*") == [f"{photos}/more/palette.gif"]
    assert prediction.find_images(paths[-1]) == paths[-1:]  # no pattern, despite its name
    (photos / "list.txt").write_text(f"turned.jpg\n\n{paths[1]}\n gone.jpg \nturned.jpg")
    expected = [paths[4], paths[1], f"{photos}/ gone.jpg ", paths[4]]  # blanks may open a name
    assert prediction.find_images(f"@{photos}/list.txt") == expected
    (photos / "list.txt").write_bytes(b"\xef\xbb\xbfgrey.jpg\r\n")  # as Notepad saves it
    assert prediction.find_images(f"@{photos}/list.txt") == paths[:1]
    (photos / "list.txt").write_text(f"turned.jpg\n\n{paths[1]}\n gone.jpg \nturned.jpg")
    monkeypatch.setenv("HOME", str(photos))
    assert prediction.find_images("~/more/*.gif") == [f"{photos}/more/palette.gif"]
    assert prediction.find_images("@~/list.txt") == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/nothing", "--images=.*nothing names no images; give a file, a folder"),
        ("{}/*.jpg", "names no images"),
        ("{}", "names no images"),
        ("@{}/gone.txt", "gone.txt cannot be read as a list .*No such file"),
        ("@{}/photo.png", "photo.png cannot be read as a list"),
    ],
)
def test_no_images(source, message, tmp_path):
    if source.endswith("png"):
        Image.new("RGB", (2, 2)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=message):
        prediction.find_images(source.format(tmp_path))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("preds.txt", "--output=preds.txt must end in .csv, .jsonl or .npz, or be -"),
        ("gone/preds.csv", "--output=gone/preds.csv is a folder, or its folder does not exist"),
        ("folder.csv", "--output=folder.csv is a folder"),
    ],
)
def test_output_that_cannot_be(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=message):
        prediction.check_output(output)


def test_more_classes_than_there_are(checkpoint):
    with pytest.raises(UserError, match="--top_k=7 is out of range: .* 6 classes.* Use 1 to 6"):
        prediction.predict_files(checkpoint, ["x.png"], top_k=7)


GOOD = {
    "image": "a,b.png",
    "predictions": [{"label": NAMES[3], "probability": 0.75}, {"label": "ant", "probability": 0.1}],
}
BAD = {"image": "bad.png", "error": "Not a readable image."}


def write(path, rows, **kwargs):
    return prediction.write_rows(rows, str(path), **{"top_k": 2, "num_rows": len(rows)} | kwargs)


def test_csv_and_json_lines_hold_the_same(tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR, "vitcls")  # pytest-xdist cannot send the bad name in a report
    odd = BAD | {"image": "caf\udce9.png"}  # a name that is no UTF-8
    assert write(tmp_path / "p.jsonl", [GOOD, odd]) == (1, 0)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [GOOD, odd]

    assert write(tmp_path / "p.csv", [GOOD, odd]) == (1, 0)
    text = (tmp_path / "p.csv").read_text(encoding="utf-8", errors="surrogateescape")
    first, second = csv.DictReader(io.StringIO(text))
    assert list(first) == [
        "image", "label_1", "probability_1", "label_2", "probability_2", "error"
    ]  # fmt: skip
    assert list(first.values()) == ["a,b.png", 'the "dog"', "0.75", "ant", "0.1", ""]
    assert list(second.values()) == [odd["image"], "", "", "", "", odd["error"]]

    one = GOOD | {"predictions": GOOD["predictions"][:1]}
    write("-", [one], top_k=1)
    assert capsys.readouterr().out == (
        'image,label,probability,error\n"a,b.png","the ""dog""",0.75,\n'
    )


def test_a_rejected_image_has_no_label_in_csv_and_says_so_in_json_lines(tmp_path):
    rows = [GOOD | {"rejected": True}, GOOD | {"rejected": False}, BAD]
    assert write(tmp_path / "p.csv", rows) == (1, 1)
    rejected, answered, _ = csv.DictReader((tmp_path / "p.csv").open())
    assert list(rejected.values()) == ["a,b.png", "", "0.75", "", "0.1", ""]
    assert list(answered.values()) == ["a,b.png", 'the "dog"', "0.75", "ant", "0.1", ""]
    assert write(tmp_path / "p.jsonl", rows) == (1, 1)
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows


def test_npz_has_the_logits_of_what_can_be_read(tmp_path):
    odd = GOOD | {"image": "caf\udce9.png", "logits": np.float32([1, 2, 3])}
    assert write(tmp_path / "p.npz", [odd, BAD, GOOD | {"logits": np.zeros(3)}]) == (1, 0)
    with np.load(tmp_path / "p.npz") as arrays:
        np.testing.assert_array_equal(arrays["logits"], np.float32([[1, 2, 3], [0, 0, 0]]))
        assert arrays["logits"].dtype == np.float32
        assert arrays["ids"].tolist() == ["caf?.png", "a,b.png"]
    prediction.check_output(str(tmp_path / "p.npz"))  # which may be written again


def test_a_rule_calibrates_and_rejects_and_logits_are_the_networks(checkpoint, photos):
    paths = [str(photos / name) for name in ALL]
    plain = list(prediction.predict_files(checkpoint, paths, top_k=6))
    kept = list(prediction.predict_files(checkpoint, paths, top_k=6, keep_logits=True))
    for one, other in zip(plain, kept, strict=True):
        assert [x["label"] for x in one["predictions"]] == [
            x["label"] for x in other["predictions"]
        ]
        assert [x["probability"] for x in other["predictions"]] == pytest.approx(
            [x["probability"] for x in one["predictions"]], abs=1e-6
        )
    logits = np.stack([row["logits"] for row in kept])
    surest = np.sort(Rule(temperature=3.0).scores(logits))
    rule = Rule(temperature=3.0, threshold=float(surest[2:4].mean()))
    rows = list(prediction.predict_files(checkpoint, paths, rule=rule))
    assert [row["rejected"] for row in rows] == (~rule.is_answered(logits)).tolist()
    assert sum(row["rejected"] for row in rows) == 3
    assert [row["predictions"][0]["probability"] for row in rows] == pytest.approx(
        rule.probabilities(logits).max(axis=1), abs=1e-6
    )


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_comes_between_leaves_the_file_as_it_was(tmp_path, failure):
    def rows():
        yield GOOD
        raise failure

    (tmp_path / "p.csv").write_text("before")
    with pytest.raises(type(failure) if isinstance(failure, OSError) else failure):
        prediction.write_rows(rows(), str(tmp_path / "p.csv"), top_k=2, num_rows=2)
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    assert (tmp_path / "p.csv").read_text() == "before"


def test_none_readable_is_a_mistake(tmp_path, caplog):
    with pytest.raises(UserError, match="None of the 12 images can be read, such as .*: Not a rea"):
        write(tmp_path / "p.csv", [BAD] * 12)
    assert list(tmp_path.iterdir()) == []


def test_images_are_decoded_a_bounded_number_ahead(photos):
    asked = []

    def paths():
        for number in range(100):
            asked.append(number)
            yield str(photos / "grey.jpg")

    found = prediction._decode_ahead(paths(), np.asarray, num_ahead=10)
    next(found)
    assert len(asked) == 11
    assert 1 + sum(1 for _ in found) == 100


def run(*args: str, **options) -> subprocess.CompletedProcess:
    if not options:
        return forked.run("vitcls.predict", *args)
    command = [sys.executable, "-m", "vitcls.predict", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, **{"text": True} | options)


def test_the_command_reports_unreadable_images_and_goes_on(checkpoint, photos, tmp_path):
    grey = (photos / "grey.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(grey[: len(grey) // 2])
    (tmp_path / "b.jpg").write_bytes(grey)
    (tmp_path / "list").write_text("a.jpg\nb.jpg\ngone.jpg\n")
    output = tmp_path / "preds.csv"
    args = f"--checkpoint={checkpoint}", f"--images=@{tmp_path}/list", f"--output={output}"
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"3 images, 2 of them unreadable -> {output}\n"
    assert "a.jpg: Not a readable image" in result.stderr
    prediction.check_output(str(output))  # which may be written again
    cut, good, gone = csv.DictReader(output.open())
    assert list(good) == ["image", "label", "probability", "error"]
    assert good["label"] in NAMES and good["error"] == ""
    assert cut["label"] == "" and "Not a readable image" in cut["error"]
    assert gone["error"] == "Cannot be read: No such file or directory."


def test_reject_applies_the_decision_of_the_checkpoint(checkpoint, photos, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "kept")
    args = f"--checkpoint={folder}", f"--images={photos}/grey.jpg", "--reject"
    everything = {"value": 0.0, "low": 0.0, "high": 0.1}
    decision = {"temperature": 2.0, "score": "energy", "threshold": None, "split": "holdout"}
    decision |= {"num_images": 40, "coverage": everything, "precision": everything}
    (folder / "decision.json").write_text(json.dumps(decision))
    result = run(*args)
    assert result.returncode == 0, result.stderr
    header, row = csv.reader(io.StringIO(result.stdout))
    assert header == ["image", "label", "probability", "error"]
    assert row[1] == "" and 0 < float(row[2]) < 1 and row[3] == ""
    assert "every image is rejected" in result.stderr
    assert "1 images, 1 rejected" in result.stderr


def test_rows_on_a_terminal_of_any_encoding_are_those_of_a_file(checkpoint, photos, tmp_path):
    for name in ("\u732b.jpg", "caf\udce9.jpg"):
        (tmp_path / name).write_bytes((photos / "grey.jpg").read_bytes())
    (tmp_path / "bad\udce9.jpg").write_bytes(b"")
    args = f"--checkpoint={checkpoint}", f"--images={tmp_path}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    result = run(*args, text=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert b"caf\xe9.jpg" in result.stdout and "\u732b.jpg".encode() in result.stdout
    assert rb"bad\udce9.jpg: The file is empty." in result.stderr
    output = tmp_path / "preds.csv"
    assert run(*args, f"--output={output}", env=environment).returncode == 0
    assert output.read_bytes() == result.stdout


def test_answers_that_are_not_finite_end_the_command(checkpoint, photos, tmp_path):
    bad = overflowing(checkpoint, tmp_path / "bad")
    (tmp_path / "a_cut.jpg").write_bytes((photos / "grey.jpg").read_bytes()[:300])
    (tmp_path / "b.jpg").write_bytes((photos / "grey.jpg").read_bytes())
    output = tmp_path / "preds.csv"
    result = run(f"--checkpoint={bad}", f"--images={tmp_path}/*.jpg", f"--output={output}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(MESSAGE.format("1 of 1", f"{tmp_path}/b.jpg"), result.stderr)
    assert not output.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint=x",), "--images is missing"),
        (("--chekpoint=x",), "Did you mean: checkpoint"),
        (("--checkpoint=x", "--images=y", "--batch_size=-1"), "--batch_size=-1"),
    ],
)
def test_mistakes_exit_2_with_one_message(args, message):
    result = run(*args)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
