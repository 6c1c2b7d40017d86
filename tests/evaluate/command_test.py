"""Any checkpoint on any split: torch's and scikit-learn's numbers, in the checkpoint's classes."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers
from overflow import MESSAGE, overflowing
from PIL import Image

from tests import forked
from vitcls.data import sources
from vitcls.data.skipped import Skipped
from vitcls.decision.kept import describe
from vitcls.decision.rule import Rule
from vitcls.errors import UserError
from vitcls.evaluate import exact

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")
NAMES = ("cat", "dog", "ant", "eel", "bee", "fox", "gnu")  # more, and in another order


def save_checkpoint(folder: Path, names: tuple[str, ...], *, order: list[int]) -> Path:
    """A network with these classes; `order` permutes the outputs of one and the same."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, id2label=dict(enumerate(names)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5 * torch.randn_like(param))
        for param in (model.classifier.weight, model.classifier.bias):
            param.copy_(param[order].clone())
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_checkpoint(folder, NAMES, order=list(range(len(NAMES))))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with 30 random images, of a size that needs no resizing."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(30):
        path = root / "test" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return root


def expected_of(checkpoint: Path, data: Path, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of images, by torch, in the checkpoint's classes."""
    labels = [NAMES.index(Path(path).parent.name) for path in paths]
    pixels = np.stack([np.asarray(Image.open(data / path), np.float32) for path in paths])
    model = transformers.ViTForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        inputs = torch.from_numpy(np.moveaxis(pixels / 127.5 - 1, -1, 1).copy())
        return np.array(labels), model(inputs).logits.numpy()


def check(metrics: dict, labels: np.ndarray, logits: np.ndarray) -> None:
    found = logits.argmax(-1)
    macro = functools.partial(
        sklearn.metrics.precision_recall_fscore_support, average="macro", zero_division=0
    )
    precision, recall, f1, _ = macro(labels, found)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    expected = {
        "num_examples": len(labels),
        "accuracy": sklearn.metrics.accuracy_score(labels, found),
        "top5_accuracy": sklearn.metrics.top_k_accuracy_score(
            labels, logits, k=5, labels=range(len(NAMES))
        ),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "loss": loss.item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def split(data) -> sources.Split:
    return sources.open_split(f"folder:{data}", "test")


@pytest.fixture(scope="module")
def evaluated(checkpoint, split) -> tuple[dict, dict]:
    return exact.evaluate_checkpoint(checkpoint, split)


def test_metrics_are_those_of_torch_and_sklearn(checkpoint, data, split, evaluated):
    metrics, predictions = evaluated
    labels, logits = expected_of(checkpoint, data, [split.id(i) for i in range(30)])
    assert 0 < metrics["accuracy"] < 1
    check(metrics, labels, logits)
    np.testing.assert_array_equal(predictions["labels"], labels)
    np.testing.assert_allclose(predictions["logits"], logits, atol=1e-4)


def test_logits_of_mirror_images_are_averaged_in(checkpoint, data, split, evaluated):
    _, predictions = exact.evaluate_checkpoint(checkpoint, split, batch_size=8, tta="flip")
    paths = [split.id(i) for i in range(30)]
    model = transformers.ViTForImageClassification.from_pretrained(checkpoint)
    pixels = np.stack([np.asarray(Image.open(data / path), np.float32) for path in paths])
    with torch.no_grad():
        mirrored = torch.from_numpy(np.moveaxis(pixels[:, :, ::-1] / 127.5 - 1, -1, 1).copy())
        expected = (evaluated[1]["logits"] + model(mirrored).logits.numpy()) / 2
    np.testing.assert_allclose(predictions["logits"], expected, atol=1e-4)
    assert np.abs(expected - evaluated[1]["logits"]).max() > 1e-3


def test_the_order_of_classes_does_not_matter(evaluated, split, tmp_path):
    order = [6, 5, 0, 2, 4, 1, 3]
    permuted = save_checkpoint(tmp_path, tuple(NAMES[i] for i in order), order=order)
    metrics, predictions = exact.evaluate_checkpoint(permuted, split, batch_size=8)
    assert metrics == pytest.approx(evaluated[0], abs=1e-6)
    assert (np.array(order)[predictions["labels"]] == evaluated[1]["labels"]).all()


def test_examples_without_a_label_are_refused(checkpoint, split, monkeypatch):
    """And not taken for the last class."""
    read = split.read
    monkeypatch.setattr(split, "read", lambda index: (read(index)[0], -1))
    with pytest.raises(UserError, match="has label -1, not one of the 3 classes"):
        exact.evaluate_checkpoint(checkpoint, split)


def run(*args: str) -> subprocess.CompletedProcess:
    return forked.run("vitcls.evaluate", *args)


def test_the_command_leaves_what_the_trainer_leaves(checkpoint, data, tmp_path):
    bad = data / "test" / "bee" / "bad.png"
    bad.write_bytes(b"no image")
    output = tmp_path / "out"
    result = run(
        f"--checkpoint={checkpoint}", f"--data=folder:{data}", f"--output={output}",
        "--on_error=skip",
    )  # fmt: skip
    bad.unlink()
    assert result.returncode == 0, result.stderr
    results = json.loads((output / "results.json").read_text())
    assert (results["checkpoint"], results["data"]) == (str(checkpoint), f"folder:{data}")
    assert (results["split"], results["num_examples"], results["num_skipped"]) == ("test", 30, 1)
    lines = result.stdout.splitlines()
    assert lines[-1] == f"test accuracy {results['accuracy']:.4f} (30 images, 1 skipped)"
    assert f"loss {results['loss']:.4f}" in lines
    saved = np.load(output / "predictions" / "test.npz")
    labels, logits = expected_of(checkpoint, data, saved["ids"].tolist())
    check(results, labels, logits)
    np.testing.assert_array_equal(saved["labels"], labels)
    np.testing.assert_allclose(saved["logits"], logits, atol=1e-4)
    assert Skipped(output / "skipped.jsonl").count("test") == 1
    (output / "results.json").unlink()  # as if it had been killed: the list is its own, too
    # The same again, with half of the images rejected.
    kept = shutil.copytree(checkpoint, tmp_path / "kept")
    rule = Rule(threshold=float(np.median(Rule().scores(logits))))
    decision = dataclasses.asdict(rule) | rule.measure(labels, logits) | {"split": "holdout"}
    (kept / "decision.json").write_text(json.dumps(decision))
    again = run(f"--checkpoint={kept}", f"--data=folder:{data}", f"--output={output}", "--reject")
    assert again.returncode == 0 and not (output / "skipped.jsonl").exists(), again.stderr
    rejected = json.loads((output / "results.json").read_text())
    assert rejected["accuracy"] == results["accuracy"] and "rejection" not in results
    assert rejected["rejection"] == rule.measure(labels, logits)
    assert rejected["rejection"]["num_answered"] == 15
    *_, promised, found, _ = again.stdout.splitlines()
    assert promised == f"promised {describe(decision)}"
    assert found == promised.replace("promised", "found").replace("holdout", "test")


def test_a_checkpoint_without_classes_is_refused(split, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=8, patch_size=4,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"checkpoint {tmp_path} has no head.*Fine-tune it first"):
        exact.evaluate_checkpoint(tmp_path, split)


def test_logits_that_are_not_finite_end_the_command(checkpoint, data, tmp_path):
    bad = overflowing(checkpoint, tmp_path / "bad")
    result = run(f"--checkpoint={bad}", f"--data=folder:{data}", f"--output={tmp_path}/out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(MESSAGE.format("30 of 30", "test/ant/00.png, "), result.stderr)
    assert not list((tmp_path / "out").rglob("*.*")) and result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint=x",), "--data is missing"),
        (("--checkpoint=x", "--data=digits", "--labels=nmae"), "--labels=nmae"),
        (("--checkpoint=x", "--data=digits", "--on_error=skip"), "skip needs --output"),
        (("--checkpoint=x", "--data=digits", "--output={}"), "is the workdir of a run"),
    ],
)
def test_mistakes_exit_2_with_one_message(args, message, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = run(*(arg.format(tmp_path) for arg in args))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
