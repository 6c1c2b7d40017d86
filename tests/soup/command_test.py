"""Soups from start to end, against torch's averages of what transformers saved."""

import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from overflow import MESSAGE, overflowing
from PIL import Image
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from tests import forked
from vitcls import inference, pretrained
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.evaluate import exact
from vitcls.logs import parameters
from vitcls.soup import means, mixing

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")
NAMES = ("cat", "dog", "ant", "eel", "bee")  # the networks', more and in another order
NETWORKS = {
    "vit": transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, id2label=dict(enumerate(NAMES)),
    ),
    "resnet": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(NAMES)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folders `vit-0` to 2 and `resnet-0` to 2 that transformers wrote, and `data`."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    for family, config in NETWORKS.items():
        for number in range(3):
            model = transformers.AutoModelForImageClassification.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
                for name, buffer in model.named_buffers():
                    if "running" in name:
                        buffer.add_(torch.rand_like(buffer))
            model.save_pretrained(root / f"{family}-{number}")
            transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(
                root / f"{family}-{number}"
            )
    rng = np.random.default_rng(0)
    for number in range(30):
        path = root / "data" / "val" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def named(root: Path, *folders: str) -> str:
    return ",".join(str(root / folder) for folder in folders)


def selection(root: Path) -> dict:
    return {"source": f"folder:{root}/data", "split": "val"}


@pytest.mark.parametrize("family", NETWORKS)
def test_a_uniform_soup_is_torchs_averaged_model(family, root, tmp_path):
    record = mixing.make(f"{root}/{family}-*", how="uniform", output=tmp_path / "out")
    models = [
        transformers.AutoModelForImageClassification.from_pretrained(root / f"{family}-{number}")
        for number in range(3)
    ]
    averaged = AveragedModel(models[0], use_buffers=True)
    for model in models:
        averaged.update_parameters(model)
    averaged.module.save_pretrained(tmp_path / "torch")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "torch")
    for name, tensor in found.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert record == json.loads((tmp_path / "out" / "soup.json").read_text())
    assert record["used"] == named(root, *(f"{family}-{n}" for n in range(3))).split(",")
    assert record["selection"] is None


def test_averaged_batch_norm_is_warned_of(root, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(mixing.log, "warning", lambda text: warnings.append(text))
    mixing.make(named(root, "resnet-0"), how="uniform", output=tmp_path / "one")
    mixing.make(named(root, "vit-0", "vit-1"), how="uniform", output=tmp_path / "vits")
    assert not warnings
    mixing.make(named(root, "resnet-0", "resnet-1"), how="uniform", output=tmp_path / "two")
    assert len(warnings) == 1 and "The running statistics of BatchNorm are averaged" in warnings[0]


@pytest.mark.parametrize("how", ["uniform", "greedy"])
def test_a_soup_of_one_is_that_checkpoint(how, root, tmp_path):
    options = selection(root) if how == "greedy" else {}
    record = mixing.make(named(root, "resnet-0"), how=how, output=tmp_path / "out", **options)
    (one,) = record["checkpoints"]
    assert record["sha256"] == one["sha256"]
    found, expected = tensors(tmp_path / "out"), tensors(root / "resnet-0")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.fixture(scope="module")
def greedy(root, tmp_path_factory) -> tuple[Path, dict, list]:
    """A soup, its record, and what was compiled for it."""
    output, original = tmp_path_factory.mktemp("greedy") / "out", inference.compile_step
    compiled = []

    def compile_step(*args, **kwargs):
        compiled.append(original(*args, **kwargs))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "compile_step", compile_step)
        record = mixing.make(f"{root}/vit-*", how="greedy", output=output, **selection(root))
    assert record == json.loads((output / "soup.json").read_text())
    return output, record, compiled


def test_all_weights_run_through_one_compiled_program(greedy):
    _, record, compiled = greedy
    assert len(record["alone"]) == len(record["additions"]) == 3
    assert len(compiled) == 1 and isinstance(compiled[0][0], jax.stages.Compiled)


def test_the_metrics_in_the_record_are_those_of_evaluate(root, greedy):
    output, record, _ = greedy
    split = sources.open_split(f"folder:{root}/data", "val")
    last = record["checkpoints"][-1]["checkpoint"]
    for checkpoint, metrics in [(last, record["alone"][last]), (output, record["metrics"])]:
        found, _ = exact.evaluate_checkpoint(checkpoint, split)
        assert metrics == pytest.approx(found, abs=1e-6), checkpoint
    of_split = (f"folder:{root}/data", "val", split.fingerprint, "accuracy")
    keys = ("data", "split", "fingerprint", "metric")
    assert tuple(record["selection"][key] for key in keys) == of_split


def test_a_greedy_soup_is_the_mean_of_what_was_kept(greedy):
    _, record, _ = greedy
    accuracies = {name: metrics["accuracy"] for name, metrics in record["alone"].items()}
    assert len(set(accuracies.values())) > 1
    tried = [addition["name"] for addition in record["additions"]]
    assert tried == sorted(accuracies, key=accuracies.get, reverse=True)
    kept = [addition for addition in record["additions"] if addition["is_kept"]]
    assert [addition["name"] for addition in kept] == record["used"]
    assert kept[-1]["metrics"] == record["metrics"]
    best = record["metrics"]["accuracy"]
    assert best >= max(accuracies.values())
    weights = means.average(pretrained.load(name)[1] for name in record["used"])
    assert parameters.sha256(weights) == record["sha256"]
    line = f"{len(kept)} of 3 checkpoints, val accuracy {best:.4f} (30 images)"
    assert mixing.describe(record) == line


def test_wise_takes_the_best_point_of_the_line(root, tmp_path):
    ends = [pretrained.load(root / f"vit-{number}")[1] for number in (0, 1)]
    record = mixing.make(
        named(root, "vit-1"), how="wise", output=tmp_path / "best", start=str(root / "vit-0"),
        metric="loss", **selection(root),
    )  # fmt: skip
    assert [point["alpha"] for point in record["alphas"]] == list(np.arange(11) / 10)
    split = sources.open_split(f"folder:{root}/data", "val")
    for number in (0, 1):  # alpha 0 and 1
        found, _ = exact.evaluate_checkpoint(root / f"vit-{number}", split)
        assert record["alphas"][-number]["metrics"] == pytest.approx(found, abs=1e-6)
    losses = {point["alpha"]: point["metrics"]["loss"] for point in record["alphas"]}
    assert record["alpha"] == min(losses, key=losses.get)
    expected = means.interpolate(*ends, record["alpha"])
    assert parameters.sha256(pretrained.load(tmp_path / "best")[1]) == parameters.sha256(expected)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_wise_never_takes_a_point_that_is_no_number(metric):
    nan = float("nan")
    begin, end = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    found = iter(
        {"accuracy": accuracy, "loss": loss}
        for accuracy, loss in ((0.99, nan), (nan, 0.1), (0.7, 0.5), (0.8, 0.4), (0.8, nan))
    )
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    weights, made = mixing._wise(begin, end, lambda *_: next(found), metric, alphas=alphas)
    assert made["alpha"] == 0.75
    np.testing.assert_array_equal(weights["w"], [0.75, 0.75])


@pytest.mark.parametrize("how", ["wise", "greedy"])
def test_soups_of_nothing_finite_are_refused(how):
    tree, bad = {"w": np.ones(2, np.float32)}, {"accuracy": 0.5, "loss": float("nan")}
    with pytest.raises(UserError, match="can be chosen: the accuracy of all of them is not finite"):
        if how == "wise":
            mixing._wise(tree, tree, lambda *_: bad, "accuracy", alphas=(0.0, 1.0))
        else:
            mixing._greedy(["a", "b"], lambda _: tree, lambda *_: bad, "accuracy")


def run(*args: str) -> subprocess.CompletedProcess:
    return forked.run("vitcls.soup", *args)


def test_the_command_with_alpha_evaluates_nothing(root, tmp_path):
    output = tmp_path / "deep" / "out"
    result = run(
        f"--checkpoints={root}/vit-1", "--how=wise", "--alpha=0.25", f"--pretrained={root}/vit-0",
        f"--output={output}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"alpha 0.25 -> {output}\n"
    record = json.loads((output / "soup.json").read_text())
    assert (record["alpha"], record["metrics"], record["selection"]) == (0.25, None, None)
    assert record["pretrained"]["head"] == "pretrained"  # the same classes
    found, start, end = (tensors(path) for path in (output, root / "vit-0", root / "vit-1"))
    for name, tensor in found.items():
        expected = torch.lerp(start[name].double(), end[name].double(), 0.25)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["deep", "out"]


def test_unreadable_images_are_refused_or_listed(root, tmp_path):
    bad = root / "data" / "val" / "bee" / "bad.png"
    bad.write_bytes(b"no image")
    options = {"how": "greedy", "output": tmp_path / "out"} | selection(root)
    try:
        with pytest.raises(UserError, match=r"bad\.png"):
            mixing.make(named(root, "vit-0"), **options)
        assert not list(tmp_path.iterdir())
        record = mixing.make(named(root, "vit-0"), on_error="skip", **options)
    finally:
        bad.unlink()
    assert (record["metrics"]["num_examples"], record["metrics"]["num_skipped"]) == (30, 1)
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"].endswith("bad.png")
    pretrained.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("checkpoints", "how", "output", "message"),
    [
        ("{}/vit-0,{}/vit-1", "wise", "out",
         "--how=wise takes one checkpoint, and --checkpoints={}/vit-0,{}/vit-1 names 2"),
        ("{}/vit-0", "uniform", "used", "--output={}/used exists and is not an empty folder"),
        ("{}/vit-0,{}/resnet-0", "uniform", "out", "are not the same network"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_leaves_nothing(checkpoints, how, output, message, root):
    (root / "used" / "already").mkdir(parents=True, exist_ok=True)
    before = sorted(root.iterdir())
    with pytest.raises(UserError, match=re.escape(message.replace("{}", str(root)))):
        mixing.make(checkpoints.replace("{}", str(root)), how=how, output=root / output)
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize("how", ["greedy", "wise"])
def test_logits_that_are_not_finite_end_it_and_leave_nothing(how, root, tmp_path):
    bad = overflowing(root / "vit-0", tmp_path / "bad")
    options = {"start": str(root / "vit-1")} if how == "wise" else {}
    with pytest.raises(UserError, match=MESSAGE.format(r"\d+ of 30", "val/ant/")) as error:
        mixing.make(str(bad), how=how, output=tmp_path / "out", **options, **selection(root))
    assert str(error.value).startswith("alpha " if how == "wise" else f"{bad}: ")
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_classes_cannot_be_chosen_from(root, tmp_path):
    network = transformers.ViTModel(NETWORKS["vit"])
    network.save_pretrained(tmp_path / "bare")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "bare"
    )
    with pytest.raises(UserError, match="bare has no head.*Fine-tune it first") as error:
        mixing.make(
            str(tmp_path / "bare"), how="greedy", output=tmp_path / "out", **selection(root)
        )
    assert "--checkpoint=" not in str(error.value)  # the command's flag is --checkpoints


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--checkpoints is missing"),
        (("--checkpoints=a",), "--how is missing"),
        (("--checkpoints=a", "--how=grady"), "--how=grady"),
        (("--checkpoints=a", "--how=greedy"), "--output is missing"),
        (("--checkpoints=a", "--how=greedy", "--output=o", "--alpha=0.5"),
         "--alpha=0.5 is for --how=wise only, not for --how=greedy; leave it out."),
        (("--checkpoints=a", "--how=uniform", "--output=o", "--split=val"),
         "--split=val has no effect: uniform soups, and WiSE-FT with --alpha, evaluate nothing"),
        (("--checkpoints=a", "--how=wise", "--output=o", "--alpha=2"), "--alpha"),
    ],
)  # fmt: skip
def test_mistakes_exit_2_with_one_message(args, message):
    result = run(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
