"""Which checkpoints a soup is made of, and which images may choose: workdirs made by hand."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vitcls import pretrained
from vitcls.checkpoints.manager import Checkpoints
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.models.vit_config import vit_config
from vitcls.pretrained.reading import variable_shapes
from vitcls.run import splits
from vitcls.soup import ingredients

CLASSES = ("ant", "bee", "cat")
CONFIG = vit_config("vit_mu4", num_classes=3, image_size=(8, 8))
PROCESSOR = pretrained.Processor(size=(8, 8), id2label=dict(enumerate(CLASSES)))


def random_weights(seed: int, config=CONFIG) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variable_shapes(config)
    )


def make_run(
    workdir: Path, *, seed: int = 0, items=None, names=CLASSES, scores=None, **fields
) -> Path:
    """A run's workdir with random weights.

    Args:
      items: Step -> the checkpoint's items.
      scores: Step -> score.
      **fields: Of the config, `data_holdout=0.2`.
    """
    config = default_config()
    config.data.source, config.train.seed = f"folder:{workdir.parent}/data", seed
    for field, value in fields.items():
        group, _, name = field.partition("_")
        config[group][name] = value
    processor = pretrained.Processor(size=(8, 8), id2label=dict(enumerate(names)))
    pretrained.write_config(workdir / "model", CONFIG, processor)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step, saved in (items or {1: {"params": random_weights(seed)}}).items():
            checkpoints.save(step, saved, meta={}, score=(scores or {}).get(step))
    return workdir


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs a and b of one seed, c of another, and the folder of data that they all name."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    for number in range(60):
        path = root / "data" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    steps = {step: {"params": random_weights(step)} for step in (1, 2, 3)}
    make_run(root / "run-a", items=steps, scores={2: 0.9, 3: 0.8})
    make_run(root / "run-b")
    make_run(root / "run-c", seed=1)
    return root


@pytest.mark.parametrize(
    ("references", "names"),
    [
        ("run-a", ["run-a@2"]),
        ("run-a@last, run-b@1,", ["run-a@3", "run-b@1"]),
        ("run-a@all,run-c", ["run-a@1", "run-a@2", "run-a@3", "run-c@1"]),
        ("run-*", ["run-a@2", "run-b@1", "run-c@1"]),
        ("run-[ab]@last", ["run-a@3", "run-b@1"]),
    ],
)
def test_references_become_checkpoints_that_stay(references, names, root, monkeypatch):
    monkeypatch.chdir(root)
    found = ingredients.find(references)
    assert [one.name for one in found] == names
    assert [one.step for one in found] == [int(name[-1]) for name in names]
    for one in found:
        saved = random_weights({"a": one.step, "b": 0, "c": 1}[one.name[4]])
        jax.tree.map(np.testing.assert_array_equal, one.read(), saved)


def test_a_runs_averaged_weights_are_taken(root):
    items = {"params": random_weights(1), "ema": random_weights(2)}
    run = make_run(root / "averaged", items={5: items})
    (found,) = ingredients.find(str(run))
    jax.tree.map(np.testing.assert_array_equal, found.read(), items["ema"])


def test_folders_are_ingredients_too(root):
    model = pretrained.make_model(CONFIG)
    pretrained.save(root / "folder", model, random_weights(7), PROCESSOR)
    found = ingredients.find(f"{root}/folder,{root}/run-b")
    assert (found[0].step, found[0].run_config(), found[0].manifest()) == (None, None, {})
    jax.tree.map(np.testing.assert_array_equal, found[0].read(), random_weights(7))


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (" ,", "--checkpoints=' ,' names no checkpoint"),
        ("{}/nobody-*", "the pattern '{}/nobody-*' matches no folder"),
        ("{}/run-b,{}/run-*", "names {}/run-b@1 twice, so it would count twice"),
        ("{}/run-b@9", "has no checkpoint '9'; it has the steps [1]"),
        ("{}/run-b,{}/data", "has no config.json"),
    ],
)
def test_references_to_nothing_are_refused(references, message, root):
    with pytest.raises(UserError, match=re.escape(message.replace("{}", str(root)))):
        ingredients.find(references.replace("{}", str(root)))


@pytest.mark.parametrize(
    ("names", "replaced", "message"),
    [
        (("ant", "cat", "bee"), {}, "  class 1: bee, cat\n  class 2: cat, bee\n"),
        (CLASSES, {"layer_norm_eps": 1e-5}, "  epsilon: 1e-06, 1e-05\n"),
    ],
)
def test_other_networks_and_classes_are_shown(names, replaced, message, root, tmp_path):
    other = make_run(tmp_path / "other", names=names)
    path = other / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | replaced))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        ingredients.find(f"{root}/run-b,{other}")
    assert f"{root}/run-b@1 and {other}@1 are not the same network" in str(error.value)


def test_runs_from_different_weights_are_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(ingredients.log, "warning", lambda text, *args: warnings.append(args))
    for name, start in [("a", {"x": "1"}), ("b", {"x": "1"}), ("c", {"x": "2"}), ("d", None)]:
        run = make_run(tmp_path / name, items={s: {"params": random_weights(s)} for s in (1, 2)})
        manifest = {"pretrained": start and {"sha256": start}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    ingredients.find(f"{tmp_path}/a@all,{tmp_path}/b")
    ingredients.find(f"{tmp_path}/d@all")
    assert not warnings
    ingredients.find(f"{tmp_path}/a,{tmp_path}/b,{tmp_path}/c,{tmp_path}/d")
    assert warnings == [(" and ".join(f"{tmp_path}/{name}@2" for name in "acd"),)]


def open_selection(root: Path, references: str, **kwargs):
    found = ingredients.find(references.replace("run", f"{root}/run"))
    source, split = ingredients.open_selection(found, **kwargs)
    return source, split.name, {split.id(index) for index in range(len(split))}


def held_out(run: Path) -> set[str]:
    config = ingredients.find(str(run))[0].run_config()
    split = splits.open_splits(config)[1]["holdout"]
    return {split.id(index) for index in range(len(split))}


def test_what_the_runs_held_out_chooses(root):
    source, name, ids = open_selection(root, "run-a@all,run-b")
    assert (source, name) == (f"folder:{root}/data", "holdout")
    assert ids == held_out(root / "run-a") and len(ids) == 5
    assert open_selection(root, "run-a,run-b", source=source, split="holdout")[2] == ids


@pytest.mark.parametrize(
    ("references", "kwargs", "message"),
    [
        (
            "run-a,run-c",
            {},
            r"of the 5 images of 'holdout' .* were trained on by .*run-c@1\. Name",
        ),
        ("run-c", {"split": "train"}, "were trained on by .*run-c@1"),
        ("run-a", {"split": "test"}, "--split=test shares images with 'test' of data.eval_splits"),
        ("run-a", {"split": "tset"}, "tset"),
        ("folder", {}, "--data is missing: .*; no checkpoint is a run that names it"),
    ],
)
def test_images_that_must_not_choose_are_refused(references, kwargs, message, root, tmp_path):
    if references == "folder":
        model = pretrained.make_model(CONFIG)
        pretrained.save(tmp_path / "folder", model, random_weights(7), PROCESSOR)
        references = str(tmp_path / "folder")
    with pytest.raises(UserError, match=message):
        open_selection(root, references, **kwargs)


def test_the_test_split_chooses_only_when_asked_to(root):
    _, name, ids = open_selection(root, "run-a", split="test", allow_eval_split=True)
    assert name == "test" and len(ids) == 12


def test_runs_that_chose_on_nothing_need_a_split(root):
    make_run(root / "unchosen", eval_select_split="")
    with pytest.raises(UserError, match=r"--split is missing: .* the runs have \[''\]"):
        ingredients.open_selection(ingredients.find(f"{root}/unchosen"))


def test_data_that_changed_is_refused(root):
    run = make_run(root / "earlier")
    manifest = {"pretrained": None, "data": {"train": {"fingerprint": "of then"}}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="training data of .*earlier@1 .* has changed"):
        ingredients.open_selection(ingredients.find(str(run)))


@pytest.fixture
def start(tmp_path) -> Path:
    """What fine-tuning began from: other classes, and twice the image size."""
    config = vit_config("vit_mu4", num_classes=2, image_size=(16, 16))
    processor = pretrained.Processor(size=(16, 16), id2label={0: "dog", 1: "eel"})
    pretrained.save(
        tmp_path / "start", pretrained.make_model(config), random_weights(8, config), processor
    )
    return tmp_path / "start"


def test_a_new_head_stays_the_fine_tuned_one(root, start):
    run = make_run(root / "tuned", model_pretrained=str(start))
    (found,) = ingredients.find(str(run))
    end = found.read()
    weights, record = ingredients.read_start(found, end)
    expected = pretrained.load(start, num_classes=3, image_size=(8, 8))[1]
    expected["params"]["classifier"] = end["params"]["classifier"]
    jax.tree.map(np.testing.assert_array_equal, weights, expected)
    assert record == {"checkpoint": str(start), "head": "fine-tuned"}
    again, _ = ingredients.read_start(found, end, checkpoint=str(start))
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_a_kept_head_is_the_pretrained_one(root, tmp_path):
    model = pretrained.make_model(CONFIG)
    pretrained.save(tmp_path / "start", model, random_weights(3), PROCESSOR)
    run = make_run(root / "kept", model_pretrained=str(tmp_path / "start"), model_head="keep")
    (found,) = ingredients.find(str(run))
    weights, record = ingredients.read_start(found, found.read())
    jax.tree.map(np.testing.assert_array_equal, weights, random_weights(3))
    assert record["head"] == "pretrained"


def test_the_hubs_commit_of_then_is_the_start(root, monkeypatch):
    run = make_run(root / "hub", model_pretrained="google/vit@main")
    recorded = {"source": "google/vit@main", "revision": "abc", "sha256": {}}
    (run / "manifest.json").write_text(json.dumps({"pretrained": recorded}))

    def load(source, **kwargs):
        raise UserError(f"asked for {source}.")

    monkeypatch.setattr(pretrained, "load", load)
    (found,) = ingredients.find(str(run))
    message = "The pretrained 'google/vit@abc' of .*hub@1 cannot be used: asked for google/vit@abc"
    with pytest.raises(UserError, match=message):
        ingredients.read_start(found, {})


def test_a_start_that_cannot_be_the_start_is_refused(root, start, tmp_path):
    (scratch,) = ingredients.find(f"{root}/run-b")
    with pytest.raises(UserError, match="run-b@1, which began from random weights .*--pretrained"):
        ingredients.read_start(scratch, scratch.read())
    run = make_run(root / "changed", model_pretrained=str(start))
    recorded = {"source": str(start), "revision": None, "sha256": {"config.json": "of then"}}
    (run / "manifest.json").write_text(json.dumps({"pretrained": recorded}))
    (found,) = ingredients.find(str(run))
    with pytest.raises(UserError, match="Its files changed since the run began, see manifest"):
        ingredients.read_start(found, found.read())
    config = vit_config("vit_mu2", num_classes=3, image_size=(8, 8))
    pretrained.save(
        tmp_path / "mu2", pretrained.make_model(config), random_weights(8, config), PROCESSOR
    )
    with pytest.raises(UserError, match=r"not the same network:\n  patch_size: \(2, 2\), \(4, 4\)"):
        ingredients.read_start(found, found.read(), checkpoint=str(tmp_path / "mu2"))
