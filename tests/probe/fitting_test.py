"""What is chosen never sees the test split, and the head that is written is the one measured."""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import forked
from tests.probe.features_test import save_checkpoint, save_images
from vitcls import pretrained
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.evaluate import exact
from vitcls.models.resnet import resnet_config
from vitcls.models.vit_config import vit_config
from vitcls.pretrained.reading import variable_shapes
from vitcls.probe import features, fitting, heads
from vitcls.step import sharding

ROOT = Path(__file__).parents[2]
NAMES = ("ant", "bee", "cat")


def run(*args: str) -> subprocess.CompletedProcess:
    return forked.run("vitcls.probe", *args)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    save_images(root / "train", 120)
    save_images(root / "test", 50, seed=1)
    return root


@pytest.fixture(scope="module")
def probed(data, tmp_path_factory) -> tuple[Path, list[str], str]:
    """The folder that a call of the command left, its arguments, and what it printed."""
    root = tmp_path_factory.mktemp("probed")
    checkpoint = save_checkpoint(root / "checkpoint")
    args = [
        f"--checkpoint={checkpoint}", f"--data=folder:{data}", f"--output={root / 'out'}",
        "--epochs=5", "--holdout=0.3",
    ]  # fmt: skip
    result = run(*args)
    assert result.returncode == 0, result.stderr
    return root / "out", args, result.stdout


def test_the_written_model_has_the_accuracy_that_was_reported(probed, data):
    folder, _, printed = probed
    results = json.loads((folder / "results.json").read_text())
    split = sources.open_split(f"folder:{data}", "test")
    metrics, _ = exact.evaluate_checkpoint(folder / "model", split)
    assert metrics["accuracy"] == pytest.approx(results["model"]["test_accuracy"], abs=1e-6)
    assert 0.4 < metrics["accuracy"] < 1
    assert printed.splitlines()[-1].startswith(f"test accuracy {metrics['accuracy']:.4f} (50 im")
    assert {name: part["num_examples"] for name, part in results["splits"].items()} == {
        "train": 84, "validation": 36, "test": 50,
    }  # fmt: skip
    methods = results["methods"]
    assert list(methods) == ["knn", "ridge", "probe"]
    for method, found in methods.items():
        line = next(line for line in printed.splitlines() if line.startswith(method))
        assert f"{found['validation_accuracy']:.4f}" in line
        assert f"{found['test_accuracy']:.4f}" in line
    seeds = methods["probe"]["test_accuracies"]
    assert len(seeds) == fitting.NUM_SEEDS
    assert methods["probe"]["test_accuracy"] == pytest.approx(np.mean(seeds))


def test_a_second_call_takes_the_features_and_replaces_the_model(probed):
    folder, args, printed = probed
    before = {path: path.stat().st_mtime_ns for path in (folder / "features").iterdir()}
    assert len(before) == 3
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed
    assert {path: path.stat().st_mtime_ns for path in (folder / "features").iterdir()} == before
    assert "Features of" not in result.stderr


@pytest.fixture(scope="module")
def parts() -> dict[str, features.Features]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))

    def part(num: int) -> features.Features:
        labels = rng.integers(0, 3, num, np.int32)
        values = centres[labels] + 1.5 * rng.normal(size=(num, 6))
        return features.Features(values.astype(np.float32), labels)

    return {"train": part(90), "validation": part(60), "test": part(70)}


@pytest.fixture(scope="module")
def results(parts) -> list[fitting.Result]:
    return fitting.fit_all(parts, num_classes=3, num_epochs=3)


def test_the_test_split_chooses_nothing(parts, results):
    wrong = parts["test"]._replace(labels=(parts["test"].labels + 1) % 3)
    others = fitting.fit_all(parts | {"test": wrong}, num_classes=3, num_epochs=3)
    for one, other in zip(results, others, strict=True):
        assert (one.method, one.chosen, one.validation_accuracy) == other[:3]
        assert one.test_accuracies != other.test_accuracies
        if one.head:
            np.testing.assert_array_equal(one.head.kernel, other.head.kernel)


def test_what_is_chosen_is_best_on_the_held_out_part(parts, results):
    """Ridge again, for every regulariser by itself."""
    scaling = heads.scaling_of(parts["train"].features)
    accuracies = {}
    for regulariser in fitting.REGULARISERS:
        head = heads.ridge(
            scaling(parts["train"].features), parts["train"].labels,
            regularisers=(regulariser,), num_classes=3,
        )  # fmt: skip
        logits = scaling(parts["validation"].features) @ head.kernel[0].T + head.bias[0]
        accuracies[regulariser] = np.mean(logits.argmax(-1) == parts["validation"].labels)
    best = max(r for r, found in accuracies.items() if found == max(accuracies.values()))
    assert len(set(accuracies.values())) > 1
    assert results[1].chosen == {"regulariser": best}
    assert results[1].validation_accuracy == pytest.approx(max(accuracies.values()))
    logits = parts["test"].features @ results[1].head.kernel.T + results[1].head.bias
    accuracy = np.mean(logits.argmax(-1) == parts["test"].labels)
    assert results[1].test_accuracies == pytest.approx([accuracy])


def test_equal_accuracies_are_decided_by_the_loss():
    accuracy = np.array([0.5, 0.75, 0.75, 0.75])
    assert fitting._best(accuracy, np.array([0.1, 0.4, 0.3, np.nan])) == 2


def test_a_probe_that_diverged_is_never_the_best():
    """Its answers are all the first class, which may be right more often than others are."""
    nan, inf = np.nan, np.inf
    accuracy = np.array([0.9, 0.4, 0.95, 0.4])
    assert fitting._best(accuracy, np.array([nan, 0.6, inf, 0.5])) == 3
    assert fitting._best(np.array([0.5, 0.5]), np.array([0.1, 0.1])) == 0
    with pytest.raises(UserError, match="The linear probe diverged with every learning rate"):
        fitting._best(accuracy, np.full(4, nan))


def test_few_examples_have_fewer_neighbours(parts):
    few = features.Features(*(field[:7] for field in parts["train"]))
    result = fitting.neighbours(parts | {"train": few}, num_classes=3)
    assert result.chosen["k"] in (1, 5, 7)


def test_trials_that_do_not_fit_are_trained_in_equal_chunks(monkeypatch):
    bytes_of_pair = fitting.NUM_SEEDS * heads.probe_bytes(6, num_classes=3, batch_size=256)
    for available, expected in ((1e15, 40), (15 * bytes_of_pair / fitting._SHARE, 14), (0, 1)):
        monkeypatch.setattr(fitting.footprint, "available_bytes", lambda mesh, a=available: a)
        assert fitting._at_once(40, 6, 3) == expected


@pytest.mark.parametrize(
    "config",
    [
        vit_config("vit_mu4", num_classes=0, image_size=(8, 8)),
        dataclasses.replace(
            vit_config("vit_mu4", num_classes=0, image_size=(8, 8)),
            family="deit", prefix_tokens=("cls", "dist"), pool="cls_dist",
        ),
        resnet_config("resnet_mu", num_classes=0, image_size=(16, 16)),
    ],
    ids=["vit", "deit", "resnet"],
)  # fmt: skip
def test_heads_are_put_on_every_kind_of_network(config, tmp_path):
    rng = np.random.default_rng(0)
    shapes = variable_shapes(config)
    variables = {
        group: jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), tree)
        for group, tree in shapes.items()
    }
    model, mesh = pretrained.make_model(config), sharding.make_mesh(-1, 1)
    processor = pretrained.Processor(size=config.image_size)
    backbone = features.Backbone(model, variables, processor, mesh)
    images = rng.normal(size=(5, *config.image_size, 3)).astype(np.float32)
    found = jax.jit(model.apply, static_argnames="train")(variables, images, train=False)
    head = heads.Linear(
        rng.normal(size=(3, found.shape[1])).astype(np.float32), np.float32([1, 2, 3])
    )
    fitting.save_with_head(tmp_path / "model", backbone, head, NAMES)
    loaded, variables, processor = pretrained.load(tmp_path / "model")
    assert processor.class_names == NAMES
    logits = jax.jit(loaded.apply, static_argnames="train")(variables, images, train=False)
    expected = np.asarray(found) @ head.kernel.T + head.bias
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint=x", "--data=digits"), "--output is missing"),
        (("--checkpoint=x", "--data=digits", "--output=o", "--split=train"),
         "--split=train is also --train_split, which is fitted on"),
        (("--checkpoint=x", "--data=digits", "--output={}"),
         "has a model that vitcls.probe did not write"),
        (("--checkpoint=x", "--data=digits", "--output=o", "--epochs=0"), "--epochs=0"),
        (("--checkpoint=./x", "--data=folder:{data}", "--output={}/o"), "'./x' does not exist"),
        (("--checkpoint=./x", "--data=digits", "--data_dir={digits}", "--output={}/o",
          "--split=train[90%:]"),
         "--split=train[90%:] shares 144 of its 144 images with --train_split=train, which is"),
        (("--checkpoint=./x", "--data=folder:{data}", "--output={}/o", "--holdout=1"),
         "Holding out 1.0 of the 120 examples"),
        (("--checkpoint=./x", "--data=folder:{data}", "--output={}/o", "--per_class=99"),
         "Cannot take 99 examples of every class"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_mistakes_exit_2_with_one_message(args, message, data, digits_dir, tmp_path):
    (tmp_path / "model").mkdir()
    result = run(*(arg.format(tmp_path, data=data, digits=digits_dir) for arg in args))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
