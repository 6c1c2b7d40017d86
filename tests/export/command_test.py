"""What was exported, run by programs that know nothing of vitcls."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from overflow import MESSAGE, overflowing
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vitcls import pretrained, train
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.export import formats
from vitcls.pretrained import processor as processors

ROOT = Path(__file__).parents[2]
CLASSES = ["<img src=x>", "[a](b) | `c`", "---\nlicence: mine"]
NETWORKS = {
    "vit": transformers.ViTConfig(
        image_size=[16, 24], patch_size=8, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=5,
    ),
    "resnet": transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4
    ),
}  # fmt: skip
PROCESSORS = {
    "vit": transformers.ViTImageProcessor(size={"height": 16, "width": 24}),
    "resnet": transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    shapes = [(40, 50), (17, 61), (32, 32), (16, 24), (90, 33), (20, 19), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folders `vit` and `resnet` that transformers wrote, and the workdir `run` of a short run."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, config in NETWORKS.items():
        model = AutoModelForImageClassification.from_config(config).eval()
        with torch.no_grad():  # so that every parameter matters
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        PROCESSORS[name].save_pretrained(root / name)
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(root / "pets" / name / f"{number}.png")
    config = default_config()
    config.data.update(source=f"folder:{root}/pets", holdout=0.25)
    config.model.pretrained = str(root / "vit")
    config.optim.update(name="sgd", lr=1e-2)  # compiles faster than adamw
    config.train.update(total_steps=2, global_batch_size=8)
    config.eval.target_coverage = 0.8
    train.train_and_evaluate(config, root / "run", devices=jax.devices()[:1])
    return root


def torch_logits(folder: Path, images: list[Image.Image]) -> np.ndarray:
    """What transformers makes of a folder."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(images, return_tensors="pt")).logits.numpy()


@pytest.mark.parametrize("name", ["vit", "resnet", "run"])
def test_transformers_answers_as_the_original(name, checkpoints, images, tmp_path):
    out = tmp_path / "deep" / "out"
    record = formats.export(str(checkpoints / name), format="huggingface", output=out)
    if name == "run":
        model, variables, processor = pretrained.load(checkpoints / name)
        apply = jax.jit(model.apply, static_argnames="train")
        expected = apply(variables, processor(images), train=False)
    else:
        expected = torch_logits(checkpoints / name, images)
    np.testing.assert_allclose(torch_logits(out, images), expected, atol=1e-4, rtol=1e-4)

    id2label = json.loads((out / "config.json").read_text())["id2label"]
    classify = transformers.pipeline("image-classification", model=str(out))
    for image, logits in zip(images, np.asarray(expected), strict=True):
        assert classify(image, top_k=1)[0]["label"] == id2label[str(logits.argmax())]

    assert record == json.loads((out / "export.json").read_text())
    assert record["largest_difference"] <= record["tolerance"]
    assert record["checked_with"] == ["transformers", "torch"]
    assert record["checkpoint"] == str(checkpoints / name) + ("@2" if name == "run" else "")
    assert {path.name for path in out.iterdir()} - {"decision.json"} == {
        "README.md", "config.json", "export.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert (out / "decision.json").exists() == (name == "run")
    if name == "run":
        decision = (checkpoints / name / "model/decision.json").read_bytes()
        assert (out / "decision.json").read_bytes() == decision
        assert "### When it should not answer" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["deep", "out"]


def test_the_card_of_a_run_has_its_classes_data_and_results(checkpoints, tmp_path):
    from huggingface_hub import ModelCard

    formats.export(f"{checkpoints}/run@last", format="huggingface", output=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    results = json.loads((checkpoints / "run" / "results.json").read_text())
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["accuracy"] == results["splits"]["test"]["accuracy"]
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert r"\<img src=x\>" in card.text
    assert str(checkpoints) not in card.content and "folder:pets" in card.text


def export_by_command(checkpoint: Path, out: Path) -> dict:
    result = subprocess.run(
        [
            sys.executable, "-m", "vitcls.export", f"--checkpoint={checkpoint}",
            "--format=stablehlo", f"--output={out.name}",
        ],
        cwd=out.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pattern = rf"largest difference \S+ on 7 images, checked with jax -> {out.name}\n"
    assert re.fullmatch(pattern, result.stdout)
    return json.loads((out / "export.json").read_text())


PROGRAM = """
import os, re, sys
sys.modules["vitcls"] = None  # an import of it fails
for folder in sys.argv[1:]:
    os.chdir(folder)
    exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1])
    seven = np.asarray(program.call(weights, np.load("batch.npy")))
    np.savez("found.npz", image=image, one=probabilities, seven=seven)
assert not [name for name in sys.modules if name.startswith(("vitcls.", "flax", "torch"))]
"""


def test_stablehlo_answers_as_the_original_in_a_process_without_vitcls(
    checkpoints, images, tmp_path
):
    expected = {}
    for name in NETWORKS:
        out = tmp_path / name
        if name == "vit":
            record = export_by_command(checkpoints / name, out)
        else:
            record = formats.export(checkpoints / name, format="stablehlo", output=out)
        assert record["largest_difference"] <= 1e-5 == record["tolerance"]
        assert b".py" not in (out / "model.stablehlo").read_bytes()  # no paths of this machine
        logits = torch.tensor(torch_logits(checkpoints / name, images))
        pixels = PROCESSORS[name](images, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.moveaxis(pixels["pixel_values"], 1, -1).astype(np.uint8)
        expected[name] = torch.softmax(logits, -1).numpy(), pixels
        np.save(out / "batch.npy", pixels)
        images[0].save(out / "image.png")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(tmp_path / name for name in NETWORKS)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name, (probabilities, pixels) in expected.items():
        found = np.load(tmp_path / name / "found.npz")
        np.testing.assert_array_equal(found["image"], pixels[0])
        np.testing.assert_allclose(found["one"], probabilities[:1], atol=1e-5)
        np.testing.assert_allclose(found["seven"], probabilities, atol=1e-5)
        label = AutoModelForImageClassification.from_pretrained(checkpoints / name).config.id2label
        assert f"{label[int(probabilities[0].argmax())]} 0." in result.stdout


@pytest.mark.parametrize("resize", [None, 30, 31, (21, 37)])
def test_the_loader_prepares_images_as_the_reference(resize, images, tmp_path):
    ours = pretrained.Processor(size=(17, 24), resize=resize, resample="bicubic")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processors.to_json(ours)))
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    lines = [x for x in formats.make_loader(ours).splitlines() if re.match("image = im|left", x)]
    for image in images:
        raw = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")
        names = {"image": image, "Image": Image}
        exec("\n".join(lines), names)
        np.testing.assert_array_equal(
            np.asarray(names["image"]), np.moveaxis(raw["pixel_values"][0], 0, -1)
        )


def test_the_documented_loader_is_the_written_one():
    text = (ROOT / "docs/export.md").read_text()
    assert formats.make_loader(pretrained.Processor(size=(224, 224))) in text


def other_logits(folder, images):
    return torch_logits(folder, images) + 1e-2


def no_number(folder, images):
    return torch_logits(folder, images) * np.nan


def stop(*_):
    raise KeyboardInterrupt


def other_weights(path):
    return {name: 1.01 * array for name, array in safetensors_load(path).items()}


safetensors_load = formats.load_file


@pytest.mark.parametrize(
    ("format", "patched", "broken", "output"),
    [
        ("huggingface", "_transformers_logits", other_logits, "new/out"),
        ("huggingface", "_transformers_logits", no_number, "empty"),
        ("huggingface", "_transformers_logits", stop, "new/out"),
        ("stablehlo", "load_file", other_weights, "empty"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failure_leaves_nothing_behind(
    format, patched, broken, output, checkpoints, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(formats, patched, broken)
    error = (KeyboardInterrupt, None) if broken is stop else (RuntimeError, "network differs from")
    with pytest.raises(error[0], match=error[1]):
        formats.export(checkpoints / "vit", format=format, output=tmp_path / output)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
    assert jax.config.jax_traceback_in_locations_limit != 0


@pytest.mark.parametrize("format", formats.FORMATS)
def test_answers_that_are_not_finite_are_the_checkpoints_fault(format, checkpoints, tmp_path):
    bad = overflowing(checkpoints / "vit", tmp_path / "bad")
    with pytest.raises(UserError, match=MESSAGE.format(r"\d of \d", "random image 0, ")):
        formats.export(bad, format=format, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_torch_our_own_reader_checks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    record = formats.export(checkpoints / "vit", format="huggingface", output=tmp_path / "out")
    assert record["checked_with"] == ["vitcls"]
    assert record["largest_difference"] == 0


def in_use(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").touch()


def a_file(tmp_path):
    (tmp_path / "out").touch()


def below_a_file(tmp_path):
    (tmp_path / "a").touch()
    return "a/out"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (in_use, "--output=.*/out exists and is not an empty folder; name another"),
        (a_file, "--output=.*/out exists and is not an empty folder; name another"),
        (below_a_file, "--output=.*/a/out cannot be made: Not a directory"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(mistake, message, tmp_path):
    output = tmp_path / (mistake(tmp_path) or "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        formats.export("no such checkpoint", format="stablehlo", output=output)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_without_a_head_has_nothing_to_export(tmp_path):
    transformers.ViTModel(NETWORKS["vit"]).save_pretrained(tmp_path / "bare")
    PROCESSORS["vit"].save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no head.*Fine-tune it first"):
        formats.export(tmp_path / "bare", format="huggingface", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--help"], 0, "--output"),
        (["--checkpoint=x", "--output=y"], 2, "--format is missing"),
        (["--checkpoint=x", "--output=y", "--format=onnx"], 2, "<huggingface|stablehlo>"),
    ],
    ids=["help", "missing", "unknown"],
)
def test_flags_are_checked_without_importing_jax(args, code, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vitcls.export", *args],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert result.returncode == code
    assert message in result.stdout + result.stderr
    assert not re.search(r"\|\s+jax$", result.stderr, re.MULTILINE)
