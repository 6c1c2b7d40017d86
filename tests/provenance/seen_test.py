"""What a run knows of its images afterwards: when it continues, and when it is evaluated."""

import csv
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forked
from vitcls import pretrained, train
from vitcls.config.fields import default_config
from vitcls.data import sources
from vitcls.errors import Interrupted, UserError
from vitcls.logs import writers
from vitcls.provenance import seen
from vitcls.provenance.continuing import warn_of_changed_splits
from vitcls.run.splits import open_splits
from vitcls.soup import ingredients

CLASSES = ("ant", "bee", "cat")


def write_images(root: Path, number: int, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for label in CLASSES:
        (root / label).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index:02}.png")


def make_config(source: str):
    config = default_config()
    config.data.update(source=source, image_size=(8, 8), num_threads=2, holdout=0.25)
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=2, global_batch_size=8)
    config.eval.batch_size = 16
    return config


def ids(split: sources.Split) -> set[str]:
    return {split.id(index) for index in range(len(split))}


@pytest.fixture(autouse=True)
def _logged(monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)


def interrupt_after_first_step(monkeypatch) -> None:
    """The run is asked to stop once, and saves."""
    add = writers.LateMetrics.add

    def add_and_interrupt(self, number, metrics):
        add(self, number, metrics)
        if number == 1:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(writers.LateMetrics, "add", add_and_interrupt)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """Divided data, and a run that was trained on them."""
    root = tmp_path_factory.mktemp("seen")
    write_images(root / "data", 20)
    train.train_and_evaluate(make_config(f"folder:{root}/data"), root / "run")
    return root / "data", root / "run"


def begin(config, workdir: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after_first_step(patch)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, workdir)


def make_old(workdir: Path) -> None:
    """As versions before `data.division` left it."""
    (workdir / "seen.npz").unlink()
    saved = json.loads((workdir / "config.json").read_text())
    del saved["data"]["division"]
    (workdir / "config.json").write_text(json.dumps(saved))


# --- continuing -----------------------------------------------------------------------------------


def test_a_run_begun_by_position_continues_so_and_says_so(tmp_path, monkeypatch, caplog):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    config.data.division = "position"
    begin(config, tmp_path / "run", monkeypatch)
    expected = {name: ids(split) for name, split in open_splits(config)[1].items()}
    make_old(tmp_path / "run")
    config.data.division = ""
    assert ids(open_splits(config)[1]["holdout"]) != expected["holdout"]
    for total_steps in (2, 3):  # a second time, too
        config.train.total_steps = total_steps
        with caplog.at_level("INFO", logger="vitcls"):
            train.train_and_evaluate(config, tmp_path / "run")
        assert "keeps its data.division='position'" in caplog.text
        for name in ("test", "holdout"):
            found = np.load(tmp_path / f"run/predictions/{name}.npz")["ids"]
            assert set(found.tolist()) == expected[name]
    config.data.division = "hash"
    with pytest.raises(UserError, match="data.division: 'position' there, 'hash' asked for"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_moved_data_continue_and_other_data_do_not(tmp_path, monkeypatch):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    begin(config, tmp_path / "run", monkeypatch)
    write_images(tmp_path / "other", 19)
    config.data.source = f"folder:{tmp_path}/other"
    with pytest.raises(UserError, match="data.source: '.*/data' there, '.*/other' asked for"):
        train.train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    config.data.source = f"folder:{tmp_path}/moved"
    assert train.train_and_evaluate(config, tmp_path / "run")["step"] == 2
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["data"]["source"] == config.data.source
    assert train.train_and_evaluate(config, tmp_path / "run")["step"] == 2  # finished


def test_moved_weights_continue_and_others_do_not(tmp_path, monkeypatch):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    train.train_and_evaluate(config, tmp_path / "first")
    for step in (1, 2):
        pretrained.save(tmp_path / f"weights{step}", *pretrained.load(tmp_path / "first"))
    path = tmp_path / "weights2/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    config.model.update(arch="", pretrained=f"{tmp_path}/weights1")
    begin(config, tmp_path / "run", monkeypatch)
    (tmp_path / "weights1").rename(tmp_path / "moved")
    config.model.pretrained = f"{tmp_path}/weights2"
    with pytest.raises(UserError, match="model.pretrained: '.*/weights1' there, '.*/weights2' ask"):
        train.train_and_evaluate(config, tmp_path / "run")
    config.model.pretrained = f"{tmp_path}/nowhere"
    message = "nowhere' cannot be compared with the weights .*Name '.*/weights1', as then"
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    config.model.pretrained = f"{tmp_path}/moved"
    assert train.train_and_evaluate(config, tmp_path / "run")["step"] == 2
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["pretrained"]["source"] == f"{tmp_path}/moved"


def test_a_run_continues_without_the_weights_it_began_with(tmp_path, monkeypatch):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    train.train_and_evaluate(config, tmp_path / "first")
    pretrained.save(tmp_path / "weights", *pretrained.load(tmp_path / "first"))
    config.model.update(arch="", pretrained=f"{tmp_path}/weights")
    begin(config, tmp_path / "run", monkeypatch)
    shutil.rmtree(tmp_path / "weights")
    assert train.train_and_evaluate(config, tmp_path / "run")["step"] == 2


def test_a_teacher_in_another_place_is_the_same_teacher(tmp_path, monkeypatch):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    train.train_and_evaluate(config, tmp_path / "first")
    config.loss.teacher = f"{tmp_path}/first@2"
    begin(config, tmp_path / "run", monkeypatch)
    (tmp_path / "first").rename(tmp_path / "moved")
    config.loss.teacher = f"{tmp_path}/moved@2"
    assert train.train_and_evaluate(config, tmp_path / "run")["step"] == 2


def test_a_test_split_that_changed_is_said_and_recorded(tmp_path, monkeypatch, caplog):
    for name, number in (("train", 20), ("test", 4)):
        write_images(tmp_path / "data" / name, number)
    config = make_config(f"folder:{tmp_path}/data")
    begin(config, tmp_path / "run", monkeypatch)
    write_images(tmp_path / "data/test", 9, seed=1)
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert "Split 'test' has changed" in caplog.text and "it now has 27 images" in caplog.text
    assert "'holdout' has changed" not in caplog.text
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["data"]["test"]["num_examples"] == 27
    assert results["splits"]["test"]["num_examples"] == 27
    for name in ("test", "holdout"):
        assert results["splits"][name]["fingerprint"] == manifest["data"][name]["fingerprint"]
    caplog.clear()
    train.train_and_evaluate(config, tmp_path / "run")
    assert "has changed" not in caplog.text
    write_images(tmp_path / "data/test", 10, seed=1)
    train.train_and_evaluate(config, tmp_path / "run")  # finished: its figures are of 27
    assert "Split 'test' has changed" in caplog.text and "it now has 30 images" in caplog.text


def test_a_split_that_chooses_and_changed_is_said(caplog):
    class Changed:
        fingerprint = "now"

        def __len__(self):
            return 7

    splits = {"val": Changed(), "test": Changed()}
    warn_of_changed_splits({"val": "then", "test": "now"}, splits, select="val")
    (record,) = caplog.records
    assert "Split 'val' has changed" in record.getMessage()
    assert "earlier checkpoints were scored on other images" in record.getMessage()


# --- evaluating -----------------------------------------------------------------------------------


def count(run: Path, source: str, name: str) -> int | None:
    split, known = seen.open_split(str(run), source, name)
    return seen.count_and_warn(known, split, source)


def test_images_that_were_trained_on_are_counted(finished, tmp_path, monkeypatch, caplog):
    data, run = finished
    source = f"folder:{data}"
    assert count(run, source, "train") == 48 - 12  # without the hold-out
    assert "trained on 36 of the 48 images of 'train'" in caplog.text
    caplog.clear()
    assert count(run, source, "test") == 0 and not caplog.records
    assert count(f"{run}@last", source, "train") == 36
    monkeypatch.chdir(data.parent)
    assert count(run, "folder:data", "train") == 36  # said otherwise
    shutil.copytree(data, tmp_path / "copy")
    assert count(run, f"folder:{tmp_path}/copy", "train") == 36  # and moved
    assert count(run, f"folder:{tmp_path}/copy", "test") == 0


def test_images_are_recognised_in_another_listing_of_the_same_files(finished):
    data, run = finished
    path = data.parent / "all.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split"])
        for image in sorted(data.glob("*/*.png")):
            writer.writerow([image.relative_to(data.parent), image.parent.name, "val"])
    assert count(run, f"csv:{path}", "val") == 36


def test_other_data_and_other_checkpoints_are_not_known(finished, tmp_path):
    data, run = finished
    write_images(tmp_path / "other", 20, seed=5)
    (tmp_path / "other/ant/00.png").unlink()
    assert count(run, f"folder:{tmp_path}/other", "train") is None
    pretrained.save(tmp_path / "weights", *pretrained.load(run))
    assert count(tmp_path / "weights", f"folder:{data}", "train") is None


def test_a_run_that_left_no_list_is_asked_for_its_data(tmp_path, caplog):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    config.data.division = "position"
    train.train_and_evaluate(config, tmp_path / "run")
    make_old(tmp_path / "run")
    source = config.data.source
    assert count(tmp_path / "run", source, "train") == 36
    assert count(tmp_path / "run", source, "test") == 0  # divided as the run's
    (tmp_path / "data").rename(tmp_path / "moved")
    assert count(tmp_path / "run", f"folder:{tmp_path}/moved", "test") == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "moved/ant/new.png")
    assert count(tmp_path / "run", f"folder:{tmp_path}/moved", "test") is None
    assert "not known" not in caplog.text
    (tmp_path / "moved").rename(tmp_path / "data")
    assert count(tmp_path / "run", source, "test") is None
    assert "not known which of these images it was trained on" in caplog.text


def test_what_is_new_in_a_divided_set_is_said(tmp_path, caplog):
    write_images(tmp_path / "data", 20)
    config = make_config(f"folder:{tmp_path}/data")
    train.train_and_evaluate(config, tmp_path / "run")
    for number in range(20, 40):
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/bee/{number}.png")
    split, known = seen.open_split(tmp_path / "run", config.data.source, "test")
    new = sum(int(Path(one).stem) >= 20 for one in ids(split))
    assert known.num_new(split, config.data.source) == new > 0
    seen.count_and_warn(known, split, config.data.source)
    assert f"{new} of its {len(split)} images are new, and were 12 then" in caplog.text


def test_a_damaged_list_is_as_none(finished, tmp_path):
    data, run = finished
    shutil.copytree(run, tmp_path / "run")
    for content in (b"", (run / "seen.npz").read_bytes()[:200]):
        (tmp_path / "run/seen.npz").write_bytes(content)
        assert count(tmp_path / "run", f"folder:{data}", "train") == 36


def test_moved_images_that_were_trained_on_choose_no_soup(finished, tmp_path):
    data, run = finished
    shutil.copytree(data, tmp_path / "copy")
    found = ingredients.find(str(run))
    source = f"folder:{tmp_path}/copy"
    message = "36 of the 48 images of 'train' that would choose were trained on by .* another path"
    with pytest.raises(UserError, match=message):
        ingredients.open_selection(found, source=source, split="train")
    message = "12 of the 12 images of 'test' that would choose were in data.eval_splits of "
    with pytest.raises(UserError, match=message):
        ingredients.open_selection(found, source=source, split="test")
    _, split = ingredients.open_selection(found, source=source, split="test", allow_eval_split=True)
    assert len(split) == 12


def test_a_candidate_that_was_trained_on_what_ranks_is_left_out(finished, tmp_path):
    selection = pytest.importorskip("vitcls.analysis.selection")
    data, run = finished
    pretrained.save(tmp_path / "weights", *pretrained.load(run))
    source = f"folder:{data}"
    split = sources.open_split(source, "train")
    parts = selection.divide(split, holdout=0.25, per_class=0, seed=7)
    names = [str(run), str(tmp_path / "weights")]
    found = selection.select(
        names, parts, folder=tmp_path / "features", num_epochs=1, source=source
    )
    assert [row.candidate.name for row in found.rows] == names[1:]
    assert "It was trained on " in found.left_out[names[0]]


@pytest.mark.parametrize(("split", "trained_on", "total"), [("train", 36, 48), ("test", 0, 12)])
def test_evaluate_writes_what_was_trained_on(finished, tmp_path, split, trained_on, total):
    data, run = finished
    flags = [f"--checkpoint={run}", f"--split={split}", f"--data=folder:{data}"]
    done = forked.run("vitcls.evaluate", *flags, f"--output={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["trained_on"], results["num_examples"]) == (trained_on, total)
    manifest = json.loads((run / "manifest.json").read_text())
    if split == "test":
        assert results["fingerprint"] == manifest["data"]["test"]["fingerprint"]
    assert ("checkpoint was trained on" in done.stderr) == bool(trained_on)
