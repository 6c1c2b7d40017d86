"""What the command says of data sets with planted mistakes, and what its pictures show."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import forked
from vitcls.check_data import checks
from vitcls.config.fields import default_config
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.run.splits import open_splits

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """12, 6 and 3 training images and 2 test images of each class, all different."""
    root = tmp_path / "data"
    counts = {"train": (12, 6, 3), "test": (2, 2, 2)}
    seed = 0
    for split, per_class in counts.items():
        for name, count in zip(CLASSES, per_class, strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture(seed).save(root / split / name / f"{number:02}.png")
                seed += 1
    return root


def check(root: pathlib.Path, *names: str, **options):
    return checks.check(f"folder:{root}", names, **options)[1]


def run(*args: str) -> subprocess.CompletedProcess:
    return forked.run("vitcls.check_data", *args)


def test_clean_data_have_no_problems(root):
    report = check(root)
    assert list(report["splits"]) == ["train", "test"]
    assert report["splits"]["train"]["counts"] == {"ant": 12, "bee": 6, "cat": 3}
    assert report["splits"]["train"]["imbalance"] == 4
    assert report["splits"]["test"]["imbalance"] == 1
    assert report["splits"]["test"]["width"] == dict.fromkeys(
        ("min", "5%", "median", "95%", "max"), 40
    )
    assert report["splits"]["test"]["formats"] == {"PNG": 6}
    assert report["problems"] == report["duplicates"] == []
    assert json.loads(json.dumps(report)) == report


def test_planted_duplicates_are_named_and_those_that_do_harm_come_first(root):
    picture(1).save(root / "train/ant/copy.bmp")
    picture(2).save(root / "test/ant/leak.png")
    picture(3).resize((80, 80)).save(root / "train/bee/other.jpg", quality=80)
    report = check(root)
    found = [
        (
            [image["id"] for image in group["images"]],
            group["is_exact"],
            group["across_splits"],
            group["different_labels"],
        )
        for group in report["duplicates"]
    ]
    assert found == [
        (["train/ant/03.png", "train/bee/other.jpg"], False, False, True),
        (["train/ant/02.png", "test/ant/leak.png"], True, True, False),
        (["train/ant/01.png", "train/ant/copy.bmp"], True, False, False),
    ]
    text = checks.format_report(report)
    assert "2 groups of images with the same pixels, 1 with nearly the same" in text
    assert "train:train/ant/02.png [ant] = test:test/ant/leak.png [ant]" in text


def test_unreadable_images_stop_training_unless_they_are_few_and_skipped(root):
    (root / "train/bee/00.png").write_bytes((root / "train/bee/01.png").read_bytes()[:200])
    Image.new("RGB", (30, 5)).save(root / "train/cat/thin.png")
    report = check(root)
    (bad,) = report["splits"]["train"]["unreadable"]
    assert bad["id"] == "train/bee/00.png" and "Not a readable image" in bad["reason"]
    assert report["splits"]["train"]["tiny"] == ["train/cat/thin.png"]
    (problem,) = report["problems"]
    assert "train: 1 of 22 images cannot be decoded, such as train/bee/00.png: Not a" in problem
    assert check(root, on_error="skip")["problems"] == []
    for path in root.glob("test/*/*0.png"):
        path.write_bytes(b"")
    assert check(root, on_error="skip")["problems"] == []  # half
    (root / "test/ant/01.png").write_bytes(b"")
    (problem,) = check(root, on_error="skip")["problems"]
    assert "test: 4 of 6 images cannot be decoded" in problem


def test_classes_that_cannot_be_learned_are_problems(root):
    lines = ["image,label,split", "train/ant/00.png,ant,train", "test/bee/00.png,bee,test"]
    (root / "labels.csv").write_text("\n".join(lines))
    _, report = checks.check(f"csv:{root}/labels.csv")
    assert report["problems"] == [
        "train: 1 of 2 classes have no images to train on: bee. Add images of them to this split, "
        "or take the classes out of the data.",
        "train: images of at least two classes are needed.",
    ]
    assert report["splits"]["train"]["imbalance"] is None
    assert "test: 1 classes without images: ant" in checks.format_report(report)
    (root / "test/dog").mkdir()
    picture(99).save(root / "test/dog/1.png")
    (problem,) = check(root)["problems"]
    assert "'test' has other classes than 'train': [] are missing, ['dog'] are new" in problem


def test_a_class_of_unreadable_images_is_a_problem_where_they_are_skipped(root):
    for path in (root / "train/cat").iterdir():
        path.write_bytes(b"")
    (problem,) = check(root, on_error="skip")["problems"]
    assert problem.startswith("train: 1 of 3 classes have no images to train on: cat. Add images")
    problems = check(root)["problems"]
    assert len(problems) == 1 and "train: 3 of 21 images cannot be decoded" in problems[0]


def test_images_in_the_training_split_and_another_are_a_problem(digits_dir):
    names = ("train[:20]", "train[15:25]")
    _, report = checks.check("digits", names, data_dir=digits_dir)
    assert any(
        "train[15:25]: 5 of its 10 images are also in train[:20], and so" in problem
        for problem in report["problems"]
    )


def test_what_training_would_refuse_is_refused(root):
    config = default_config()
    config.data.source, config.data.on_error = f"folder:{root}", "skip"
    config.eval.select_split = ""
    for number in (1, 2):
        (root / f"train/cat/{number:02}.png").write_bytes(b"")
    report = check(root, on_error="skip")
    assert report["problems"] == []
    checks.check_training(config, report)
    config.data.per_class = 2
    for seed in range(20):
        config.train.seed = seed
        train, _ = open_splits(config)
        if "train/cat/00.png" not in {train.id(index) for index in range(len(train))}:
            break
    with pytest.raises(UserError, match="1 of 3 classes have no images to train on: cat"):
        checks.check_training(config, report)


def test_data_that_cannot_be_opened_are_reported_with_the_rest(root):
    (root / "train/empty").mkdir()
    report = check(root)
    assert list(report["splits"]) == ["test"]
    assert "train: no images in 1 of 4 classes: empty" in report["problems"][0]
    (root / "train/empty").rmdir()
    # Nothing is learned from a split that only measures: a folder without images does no harm.
    (root / "test/empty").mkdir()
    report = check(root)
    assert report["problems"] == []
    assert "Not used: empty, without images." in report["splits"]["test"]["found"]
    assert report["splits"]["test"]["found"] in checks.format_report(report)
    (problem,) = check(root / "nowhere")["problems"]
    assert "nowhere does not exist" in problem
    assert checks.format_report(check(root / "nowhere"))


def test_tables_of_many_classes_show_the_largest_and_the_smallest():
    counts = {f"class{k}": 1000 - k for k in range(500)}
    lines = checks._class_table({"train": {"counts": counts}})
    assert len(lines) == 1 + 41
    assert lines[1].split() == ["class0", "1000"] and lines[-1].split() == ["class499", "501"]


def test_examples_are_drawn_evenly_over_classes(root, monkeypatch):
    tiles = []
    monkeypatch.setattr(checks, "contact_sheet", lambda drawn, **_: tiles.extend(drawn))
    (root / "test/ant/00.png").write_bytes(b"")
    splits, report = checks.check(f"folder:{root}")
    checks.draw_examples(splits, report)
    captions = [caption for _, caption in tiles]
    assert captions.count("ant\ntrain") == 12 and captions.count("cat\ntrain") == 3
    assert captions.count("ant\ntest") == 1
    assert np.array_equal(tiles[0][0], picture(0))


@pytest.mark.parametrize("flip", [False, True])
def test_training_pictures_are_what_the_network_sees(root, monkeypatch, flip):
    config = default_config()
    config.data.update(source=f"folder:{root}", image_size=(16, 16), crop="none")
    config.model.arch = "vit_mu4"
    config.augment.flip = flip
    config.train.update(global_batch_size=8, total_steps=2)
    config.eval.select_split = ""
    tiles = []
    monkeypatch.setattr(checks, "contact_sheet", lambda drawn, **_: tiles.extend(drawn))
    checks.draw_training(config)
    train = sources.open_split(config.data.source, "train")
    whole = {}
    for index in range(len(train)):
        image, label = train.image(index)
        pixels = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
        whole[pixels.tobytes()] = whole[pixels[:, ::-1].tobytes()] = label, pixels.tobytes()
    mirrored = set()
    assert len(tiles) == 16
    for tile, caption in tiles:
        label, original = whole[np.asarray(tile).tobytes()]
        assert caption == CLASSES[label]
        mirrored.add(np.asarray(tile).tobytes() != original)
    assert mirrored == ({False, True} if flip else {False})


def test_training_pictures_leave_out_what_training_skips_and_need_no_cache(
    root, tmp_path, monkeypatch
):
    config = default_config()
    config.data.update(source=f"folder:{root}", image_size=(16, 16), on_error="skip")
    config.data.cache = str(tmp_path)
    config.model.arch = "vit_mu4"
    config.train.update(global_batch_size=24, total_steps=1)
    config.eval.select_split = ""
    (root / "train/bee/00.png").write_bytes(b"")
    tiles = []
    monkeypatch.setattr(checks, "contact_sheet", lambda drawn, **_: tiles.extend(drawn))
    checks.draw_training(config)
    # The 21 images of an epoch but the bad one, and the next epoch's first three.
    assert 24 - 2 <= len(tiles) <= 24 - 1
    assert config.data.cache == str(tmp_path)


def test_captions_tell_mixtures_from_smoothed_labels():
    describe = checks._describe_target
    assert describe(np.array([0.033, 0.933, 0.033]), CLASSES, 0.1 / 3) == "bee"
    assert describe(np.array([0.7, 0.0, 0.3]), CLASSES, 0.0) == "0.70 ant\n0.30 cat"
    assert describe(np.array([0.0, 1.0]), CLASSES[:2], 0.0) == "bee"
    assert describe(np.array([0.15, 0.85]), CLASSES[:2], 0.3 / 2) == "bee"


def test_command_writes_report_and_pictures_and_says_when_training_would_fail(root, tmp_path):
    picture(0).save(root / "test/ant/leak.png")
    (root / "train/bee/00.png").write_bytes(b"")
    out = tmp_path / "out"
    result = run(f"--data=folder:{root}", f"--output={out}")
    assert result.returncode == 2
    assert "ERROR: Training would fail:\n  train: 1 of 21 images cannot be" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[0].startswith("split  images  unreadable")
    report = json.loads((out / "report.json").read_text())
    assert len(report["problems"]) == len(report["duplicates"]) == 1
    for name in ("contact_sheet.png", "duplicates.png"):
        with Image.open(out / name) as image:
            image.load()
    assert not (out / "augmented.png").exists()
    again = run(f"--data=folder:{root}", f"--output={out}")
    assert again.stdout == result.stdout


def test_command_checks_the_data_of_a_config(root, tmp_path):
    result = run(
        "--config=configs/quickstart.py:init=scratch", f"--data=folder:{root}",
        "--config.train.global_batch_size=16", "--config.optim.warmup_steps=1",
        f"--output={tmp_path}/out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f"nothing would stop training -> {tmp_path}/out")
    with Image.open(tmp_path / "out/augmented.png") as image:
        assert image.width == 10 * 100 + 4
    result = run("--config=configs/quickstart.py")
    assert result.returncode == 2 and "--config needs --output" in result.stderr
    result = run()
    assert result.returncode == 2 and "--data is missing" in result.stderr


def test_names_that_the_terminal_cannot_print_are_reported(root, tmp_path):
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "\u732b caf\udce9")
    (root / "train/bee/00.png").rename(root / "train/bee/\udcff.png")
    (root / "train/bee/\udcff.png").write_bytes(b"")
    command = [sys.executable, "-m", "vitcls.check_data", f"--data=folder:{root}"]
    result = subprocess.run(
        [*command, f"--output={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert r"train/bee/\udcff.png" in result.stderr and r"\u732b caf\udce9" in result.stdout
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["splits"]["train"]["counts"]["\u732b caf\udce9"] == 12
