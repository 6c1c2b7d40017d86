"""A report is one safe, whole page, whatever the run left and whatever its names are."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forked
from vitcls import cli, errors, pretrained
from vitcls.analysis import explaining, gallery, page, predictions, report, run
from vitcls.config.fields import default_config
from vitcls.decision import kept
from vitcls.models.vit_config import vit_config

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }} $\\frac$ &amp; \u202eabc \ud800",
)
_VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects what a browser would make of a page; fails where tags are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["script"] else ""

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def check_page(text: str) -> Page:
    """Whole, small, accessible in what a program can tell, and unable to do or load anything."""
    text.encode("utf-8")
    assert len(text.encode()) < 5e6
    assert text.lstrip().startswith("<!DOCTYPE html>")
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    script = re.search(r"<script>(.*)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    for tag, attrs in found.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form", "link", "foreignobject"}
        assert not [name for name in attrs if name.startswith("on")], attrs
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("data:image/png;", "data:image/jpeg;", "#"))
        assert tag != "img" or attrs["alt"]
        assert tag != "th" or attrs["scope"]
        assert tag != "html" or attrs["lang"] == "en"
    assert not re.search(r"url\((?!#)|@import", text)
    ids = found.attributes("id")
    assert len(ids) == len(set(ids))
    for link in found.attributes("href"):
        assert link[1:] in ids, link
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    return found


def write(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))


def make_run(
    folder: Path, names=HOSTILE, *, num: int = 60, mistakes: float = 0.3, ids=None, **config
) -> Path:
    """A workdir as a run leaves it, with predictions drawn at random."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    fields = default_config()
    fields.data.update(source="folder:/nowhere/here", image_size=(16, 16))
    fields.model.arch = "vit_mu4"
    fields.train.update(total_steps=4, global_batch_size=8)
    fields.update_from_flattened_dict(config)
    write(folder / "config.json", fields.to_dict())
    write(folder / "model/config.json", {"id2label": dict(enumerate(names))})
    write(
        folder / "manifest.json",
        {
            "command": ["/bin/python", "-m", "vitcls.main", f"--config.data.source={names[0]}"],
            "git_commit": "0" * 40 + "-dirty",
            "devices": {"kind": "<b>cpu", "count": 1},
        },
    )
    lines = [{"step": s, "time": 1.0, "train/loss": 2.0 / s, "train/lr": 1e-3} for s in (1, 2, 3)]
    lines.append({"step": 4, f"{names[0]}/loss": 1.0, "holdout/accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "results.json", {"step": 4, "seconds": 12.5, "splits": {"test": {}}})
    (folder / "predictions").mkdir(exist_ok=True)
    for split in ("test", "holdout"):
        labels = rng.integers(0, len(names), num).astype(np.int32)
        said = np.where(rng.uniform(size=num) < mistakes, (labels + 1) % len(names), labels)
        logits = rng.normal(size=(num, len(names))).astype(np.float32)
        logits[np.arange(num), said] += 9
        own = [f"{names[0]}{i}" for i in range(num)] if ids is None else ids
        np.savez(
            folder / f"predictions/{split}.npz", labels=labels, logits=logits, ids=np.array(own)
        )
    return folder


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(page.classification, "NUM_RESAMPLES", 20)
    monkeypatch.setattr(page.classification.summarise, "__kwdefaults__",
                        {"num_resamples": 20, "seed": 0})  # fmt: skip


def test_hostile_names_are_text(tmp_path):
    found = check_page(page.render(run.read_run(make_run(tmp_path / HOSTILE[0]))))
    for name in HOSTILE[:3]:
        assert name in found.text
    assert "{{ 7 * 7 }} $\\frac$ &amp;  abc" in found.text
    assert [attrs for tag, attrs in found.tags if tag == "img"] == []  # no data: none are shown
    assert "The images cannot be shown" in found.text
    assert "Files differed from that commit" in found.text


def test_a_thousand_classes(tmp_path):
    names = [f"class {k} of a thousand, with a name as long as ImageNet's are" for k in range(1000)]
    workdir = make_run(tmp_path / "run", names, num=1200)
    found = check_page(page.render(run.read_run(workdir)))
    assert all(name in found.text for name in names)
    assert [attrs["class"] for tag, attrs in found.tags if tag == "img"] == ["map"]


def test_no_mistake(tmp_path):
    found = check_page(page.render(run.read_run(make_run(tmp_path / "run", mistakes=0.0))))
    assert "No mistake in 60 images" in found.text
    assert "accuracy is above 0.9513" in found.text  # 0.05 ** (1 / 60)
    assert "There is no mistake." in found.text and "No class was mistaken" in found.text


@pytest.mark.parametrize(
    "gone",
    [
        ["config.json"], ["manifest.json"], ["metrics.jsonl"], ["results.json"],
        ["model/config.json"], ["predictions/test.npz"],
        ["results.json", "predictions/test.npz", "predictions/holdout.npz"],
        ["config.json", "manifest.json", "model/config.json", "results.json", "metrics.jsonl"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_killed_run_with_pieces_missing_or_cut(tmp_path, gone):
    workdir = make_run(tmp_path / "run")
    (workdir / "checkpoints").mkdir()
    for name in gone:
        content = (workdir / name).read_bytes()
        (workdir / name).write_bytes(content[: len(content) // 2])
    damaged = check_page(page.render(run.read_run(workdir)))
    for name in gone:
        assert name in damaged.text
        (workdir / name).unlink()
    found = check_page(page.render(run.read_run(workdir)))
    if "results.json" in gone:
        assert "The run has not ended" in found.text
    if len(gone) == 3:
        assert "Predictions are missing" in found.text and "Confusion" not in found.text


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": 3, "eval": null}', "nonsense", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "results.json"])
def test_files_of_another_kind(tmp_path, name, content):
    workdir = make_run(tmp_path / "run")
    (workdir / name).write_text(content, encoding="latin-1")
    check_page(page.render(run.read_run(workdir)))


def test_degenerate_predictions(tmp_path):
    workdir = make_run(tmp_path / "run", ["only"], num=1)
    check_page(page.render(run.read_run(workdir)))
    workdir = make_run(tmp_path / "run", HOSTILE, num=1, mistakes=1.0)
    assert "– is undefined" in check_page(page.render(run.read_run(workdir))).text


@pytest.fixture
def with_images(tmp_path) -> Path:
    """A run whose data are there: classes with hostile names, 3 images each, one not readable."""
    names = HOSTILE[:1] + HOSTILE[2:3]
    ids = []
    for split in ("train", "test"):
        for k, name in enumerate(names):
            for i in range(3):
                path = tmp_path / "data" / split / name / f"{i}.png"
                path.parent.mkdir(exist_ok=True, parents=True)
                Image.new("RGB", (20, 20), (60 * k, 50 * i, 90)).save(path)
                if split == "test":
                    ids.append(str(path.relative_to(tmp_path / "data")))
    (tmp_path / "data" / ids[0]).write_bytes(b"no image")
    made = make_run(
        tmp_path / "run", names, num=6, ids=ids,
        **{"data.source": f"folder:{tmp_path / 'data'}", "eval.select_split": "",
           "train.global_batch_size": 8},
    )  # fmt: skip
    network = vit_config("vit_mu4", num_classes=2, image_size=(16, 16))
    processor = pretrained.Processor(size=(16, 16), id2label=dict(enumerate(names)))
    pretrained.write_config(made / "model", network, processor)
    return made


def test_images_are_shown_with_what_explains_them(with_images):
    asked, classes = [], []

    def explain(images, predicted):
        asked.extend(images)
        classes.extend(predicted)
        return [[image, Image.new("RGB", (5, 5))] for image in images], "Bright is more."

    found = check_page(page.render(run.read_run(with_images), explain=explain))
    sources = found.attributes("src")
    assert len(asked) == sum(alt.startswith("explanation") for alt in found.attributes("alt")) > 4
    augmented = [alt for alt in found.attributes("alt") if alt.startswith("training image: ")]
    assert len(augmented) == gallery.NUM_SHOWN and set(augmented) == {
        f"training image: {name}" for name in (HOSTILE[0], HOSTILE[2])
    }
    assert len(sources) == 2 * len(asked) + len(augmented)
    assert "not shown" in found.text  # the one that is no image
    assert "Bright is more." in found.text and set(classes) == {0, 1}
    shown = np.asarray(asked[0])
    assert shown.shape == (20, 20, 3) and (shown == shown[0, 0]).all()


@pytest.mark.parametrize("damage", ["no weights", "no network", "of other classes"])
def test_without_maps_the_page_says_why(with_images, damage):
    if damage == "no network":
        (with_images / "model" / "config.json").unlink()
    read = run.read_run(with_images)

    def of_other_classes(images, predicted):
        raise IndexError

    explain = of_other_classes if damage == "of other classes" else explaining.for_gallery(
        with_images
    )  # fmt: skip
    found = check_page(page.render(read, explain=explain))
    assert "Explanation maps are left out: " in found.text
    assert not [alt for alt in found.attributes("alt") if alt.startswith("explanation")]
    assert [alt for alt in found.attributes("alt") if "predicted" in alt]


def test_images_of_data_that_changed_are_not_shown(with_images):
    manifest = json.loads((with_images / "manifest.json").read_text())
    write(with_images / "manifest.json", manifest | {"data": {"test": {"fingerprint": "other"}}})
    images, note = gallery.open_images(run.read_run(with_images), "test", ["a"])
    assert images == [None] and "the data have changed" in note


def test_what_a_threshold_promised_and_keeps_is_shown(tmp_path):
    workdir = make_run(tmp_path / "run")
    results = json.loads((workdir / "results.json").read_text())
    write(workdir / "results.json", results | {"selected_step": 4})
    hold_out = predictions.read_predictions(workdir, "holdout")
    origin = {"step": 4, "split": "holdout", "tta": "none"}
    targets = {"target_coverage": 0.8}
    decision = kept.decide(hold_out.labels, hold_out.logits, origin=origin, targets=targets)
    write(workdir / "model/decision.json", decision)
    text = check_page(page.render(run.read_run(workdir))).text
    assert f"Promised: {kept.describe(decision)} Found: " in text and "60 images of test." in text
    write(workdir / "model/decision.json", decision | {"threshold": None})
    assert "images below any score" in check_page(page.render(run.read_run(workdir))).text
    write(workdir / "model/decision.json", decision | {"step": 2})  # of other weights
    assert run.read_run(workdir).decision == {}
    write(workdir / "model/decision.json", {"coverage": "all"})
    read = run.read_run(workdir)
    assert read.decision == {} and "decision.json cannot be used" in " ".join(read.problems)


def command(*args, **env) -> subprocess.CompletedProcess:
    return forked.run("vitcls.analysis.report", *map(str, args), **env)


def test_command_writes_the_page(tmp_path):
    workdir = make_run(tmp_path / "run")
    np.savez(tmp_path / "other.npz", logits=np.zeros((9, 4), np.float32))
    result = command(workdir, f"--unknown={tmp_path}/other.npz")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{workdir}: 0.") and result.stdout.endswith("report.html\n")
    found = check_page((workdir / "report.html").read_text())
    assert "confidence tells 9 of them" in found.text and "and the energy with 1.0000" in found.text
    assert "With --reject" not in found.text and "over 1000 resamples" in found.text
    assert not (workdir / "report.html.tmp").exists()
    assert command(workdir, "--noexplain").returncode == 0


def said(monkeypatch, *args: str) -> str:
    """The error of a command line, in this process."""
    monkeypatch.setattr(report._OUTPUT, "_flagvalues", report._OUTPUT._flagvalues)
    rest = cli._parse_flags(["report", *args], "DIR")
    with pytest.raises(errors.UserError) as error:
        report.main(rest)
    return str(error.value)


def test_mistakes_in_the_command(tmp_path, monkeypatch):
    one = make_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is one page, but there are 2" in said(monkeypatch, f"--output={one}/a", f"{one}", "b")
    text = said(monkeypatch, f"{one}", f"--output={tmp_path}")
    assert "is a folder, or in a missing folder" in text
    assert "nowhere is not a folder" in said(monkeypatch, "--output=", f"{tmp_path}/nowhere")
    assert "is not a workdir: it has none of config.json" in said(monkeypatch, f"{empty}")
    text = said(monkeypatch, f"{one}", "--split=train")
    assert "--split=train has no readable predictions; these have: test, holdout." in text
    assert "x.csv does not exist" in said(monkeypatch, f"{one}", "--split=", "--unknown=x.csv")
    assert list(empty.iterdir()) == [] and not (one / "report.html").exists()
    with pytest.raises(errors.UserError, match="DIR is missing"):
        cli._parse_flags(["report", "--unknown="], "DIR")
    with pytest.raises(errors.UserError, match="Unexpected argument 'x'"):
        cli._parse_flags(["other", "x"], "")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "vitcls.analysis.page")
    monkeypatch.delattr("vitcls.analysis.page")
    text = said(monkeypatch, f"{make_run(tmp_path / 'run')}")
    assert text == "Reports need jinja2: pip install -r requirements-analysis.txt"


def test_predictions_that_cannot_be_used_say_why(tmp_path):
    def read(**arrays):
        (tmp_path / "predictions").mkdir(exist_ok=True)
        np.savez(tmp_path / "predictions/test.npz", **arrays)
        with pytest.raises(errors.UserError) as error:
            predictions.read_predictions(tmp_path, "test")
        return str(error.value)

    with pytest.raises(errors.UserError, match="the run has not ended. Run its command again"):
        predictions.read_predictions(tmp_path, "test")
    good = dict(labels=np.array([0, 1]), logits=np.zeros((2, 2)), ids=np.array(["a", "b"]))
    assert "It should hold labels, logits and ids" in read(labels=good["labels"])
    assert "must have the shapes" in read(**good | {"logits": np.zeros(2)})
    assert "has no examples" in read(
        labels=np.zeros(0, int), logits=np.zeros((0, 2)), ids=np.zeros(0, str)
    )
    assert "labels must be integers from 0 to 1" in read(**good | {"labels": np.array([0, 2])})
    assert "logits of 1 of 2 images are not finite" in read(
        **good | {"logits": np.array([[0, np.nan], [0, 1]])}
    )
    assert "cannot be read" in read(**good | {"ids": np.array([{}, {}], object)})
    with pytest.raises(errors.UserError, match="there are predictions for test"):
        predictions.read_predictions(tmp_path, "other")


def test_confidence_is_read_from_what_predict_writes(tmp_path):
    table = tmp_path / "preds.csv"
    table.write_text("image,label_1,probability_1,error\na,x,0.75,\nb,,,Cut.\nc,y,0.5,\n")
    assert predictions.read_confidence(table).tolist() == [0.75, 0.5]
    table.write_text("image,label,probability,error\na,x,0.25,\n")
    assert predictions.read_confidence(table).tolist() == [0.25]
    table.write_text("image,label\na,x\n")
    with pytest.raises(errors.UserError, match="neither CSV of vitcls.predict nor an npz"):
        predictions.read_confidence(table)
    table.write_text("image,label,probability,error\na,,,Cut.\n")
    with pytest.raises(errors.UserError, match="has no images"):
        predictions.read_confidence(table)
