"""Every command takes the same images for the same classes, or all refuse: a random search."""

import json

import numpy as np
import pytest

from tests.random_data import SPOILERS, WRITERS, Picture, draw
from vitcls import train
from vitcls.check_data import checks
from vitcls.config.fields import default_config
from vitcls.data import sources
from vitcls.data.sources import classes
from vitcls.errors import UserError
from vitcls.evaluate import exact
from vitcls.predict import rows as prediction
from vitcls.run.splits import open_splits

NUM_SETS, NUM_SPOILED, NUM_TRAINED = 200, 10, 8

VALIDATION = dict.fromkeys(("val", "valid", "dev", "validation"), "validation")
# Image -> its split and the name of its class.
Seen = dict[bytes, tuple[str, str]]


def make_config(source: str, pictures: list[Picture]):
    config = default_config()
    config.data.update(source=source, image_size=(8, 8), num_threads=2, holdout=0.25)
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=2, global_batch_size=8)
    config.optim.warmup_steps = 0
    if any(one.split == "validation" for one in pictures):
        config.eval.select_split = "val"
    return config


def seen_in(split: sources.Split, name: str, class_names=None) -> Seen:
    class_names = class_names or split.class_names
    read = (split.read(index) for index in range(len(split)))
    return {data: (name, class_names[label]) for data, label in read}


def seen_by_training(config) -> tuple[Seen, tuple[str, ...]]:
    train_split, evaluated = open_splits(config)
    seen = seen_in(train_split, "train")
    for name, split in evaluated.items():
        role = "train" if name == "holdout" else VALIDATION.get(name, name)
        seen |= seen_in(split, role, train_split.class_names)
    return seen, train_split.class_names


def seen_by_evaluate(source: str, model_names: tuple[str, ...]) -> Seen:
    seen = {}
    for name in sources.split_names(source):
        split = sources.open_split(source, name)
        positions = classes.match(split.class_names, model_names, by="name")
        names = [model_names[place] for place in positions]
        seen |= seen_in(split, VALIDATION.get(name, name), names)
    return seen


def seen_by_check(source: str) -> Seen:
    splits, report = checks.check(source)
    if report["problems"]:
        raise UserError(str(report["problems"]))
    seen = {}
    for name, split in splits.items():
        one = seen_in(split, VALIDATION.get(name, name))
        counts = report["splits"][name]["counts"]
        labels = [label for _, label in one.values()]
        assert {label: labels.count(label) for label in counts} == counts
        seen |= one
    return seen


def attempt(see):
    try:
        return see()
    except UserError as error:
        return f"refused: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", range(NUM_SETS // len(WRITERS) + 1))
def test_every_command_sees_the_same_images_and_labels(tmp_path, kind, number):
    rng = np.random.default_rng([number, len(kind)])
    pictures = draw(rng)
    source = WRITERS[kind](tmp_path / "data", rng, pictures)
    has_splits = pictures[0].split != ""
    truth = {one.data: (one.split, one.label) for one in pictures}
    config = make_config(source, pictures)
    trained = attempt(lambda: seen_by_training(config))
    checked = attempt(lambda: seen_by_check(source))
    if isinstance(trained, str):
        # Something is wrong with the data: then it is so for whoever asks, and it is said.
        assert isinstance(checked, str), (trained, checked)
        return
    trained, class_names = trained
    evaluated = seen_by_evaluate(source, class_names)
    for other in (evaluated, checked):
        assert trained.keys() == other.keys()
        assert {data for data in trained if trained[data] != other[data]} == set()
    if not has_splits:
        assert {split for split, _ in trained.values()} == {"train", "test"}
        trained = {data: ("", label) for data, (_, label) in trained.items()}
    assert trained.keys() == truth.keys()
    assert [(trained[data], truth[data]) for data in truth if trained[data] != truth[data]] == []
    if class_names[0].isdecimal() and kind != "hf":
        assert [int(name) for name in class_names] == sorted(map(int, class_names))
    if kind == "folder":
        root = tmp_path / "data"
        found = prediction.find_images(str(root))
        assert sorted(found) == sorted(str(root / one.path) for one in pictures)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", range(NUM_SPOILED))
def test_every_command_refuses_the_same(tmp_path, kind, number):
    rng = np.random.default_rng([number, len(kind), 7])
    pictures = draw(rng)
    source = WRITERS[kind](tmp_path / "data", rng, pictures)
    SPOILERS[kind](tmp_path / "data", rng, pictures)
    names = tuple(sorted({one.label for one in pictures}))
    config = make_config(source, pictures)
    for see in (
        lambda: seen_by_training(config),
        lambda: seen_by_check(source),
        lambda: seen_by_evaluate(source, names),
    ):
        with pytest.raises(UserError):
            see()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_TRAINED))
def test_a_trained_network_says_the_same_in_every_command(tmp_path, number):
    """Training, evaluate and predict agree on the label and the likeliest class of every image."""
    rng = np.random.default_rng([number, 99])
    pictures = draw(rng)
    source = WRITERS["folder"](tmp_path / "data", rng, pictures)
    workdir = tmp_path / "run"
    train.train_and_evaluate(make_config(source, pictures), workdir)
    split = sources.open_split(source, "test")
    _, predictions = exact.evaluate_checkpoint(workdir, split, batch_size=8)
    names = json.loads((workdir / "model/config.json").read_text())["id2label"]
    saved = np.load(workdir / "predictions/test.npz")
    np.testing.assert_allclose(saved["logits"], predictions["logits"], atol=1e-4)
    np.testing.assert_array_equal(saved["labels"], predictions["labels"])
    truth = {one.path: one.label for one in pictures}
    assert [names[str(label)] for label in saved["labels"]] == [truth[i] for i in saved["ids"]]
    paths = [str(tmp_path / "data" / one) for one in saved["ids"]]
    rows = list(prediction.predict_files(workdir, paths, batch_size=8))
    best = [names[str(one)] for one in saved["logits"].argmax(1)]
    assert [row["predictions"][0]["label"] for row in rows] == best
