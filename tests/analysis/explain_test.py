"""The command's pictures: of which images, of what in them, and what it says of mistakes."""

import csv
import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from overflow import MESSAGE, overflowing
from PIL import Image

from tests import forked
from vitcls import errors, pretrained
from vitcls.analysis import explaining, overlay
from vitcls.models.resnet import ResNet, resnet_config

ASSET = Path(__file__).parents[2] / "assets" / "vit-nano-glyphs"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two folders with an image of the same name, one whose name is hostile, and one damaged."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("a/one.png", "b/one.png", "b/<b> $x$ \u00e9.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(root / name)
    (root / "b" / "cut.png").write_bytes((root / "a/one.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def explainer() -> explaining.Explainer:
    return explaining.load_explainer(ASSET, num_images=2, batch_size=8)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "explained.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_are_the_networks_crop_beside_the_map_over_it(photos, explainer, tmp_path):
    paths = sorted(str(path) for path in photos.rglob("*.png"))
    output = tmp_path / "new" / "maps"
    num_bad = explaining.write_pictures(
        explainer, explaining.file_sources([*paths, "gone.png"]), str(output), class_name="A"
    )
    assert num_bad == 2
    rows = table(output)
    assert [row["image"] for row in rows] == [*paths, "gone.png"]
    assert [bool(row["error"]) for row in rows] == ["cut" in path for path in paths] + [True]
    good = [row for row in rows if row["picture"]]
    assert {path.name for path in output.iterdir()} == {
        "explained.csv", *(row["picture"] for row in good)
    }  # fmt: skip
    processor = explainer.processor
    pixels = [processor.pixels(Image.open(row["image"])) for row in good]
    names = processor.class_names
    maps = explainer(pixels, [names.index("A")] * 3)
    for row, one, (heat, probabilities) in zip(good, pixels, maps, strict=True):
        assert row["explained"] == "A" and row["label"] == names[probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(probabilities.max(), rel=1e-3)
        picture = np.asarray(Image.open(output / row["picture"]), np.int32)
        assert picture.shape == (240, 480, 3)
        np.testing.assert_array_equal(picture[5::10, 5:240:10], one)  # enlarged ten times
        drawn = np.asarray(overlay.draw_map(one, heat), np.int32)
        assert np.abs(picture[:, 240:] - drawn).mean() < 1


def test_maps_do_not_depend_on_batches(explainer):
    rng = np.random.default_rng(1)
    pixels = [rng.integers(0, 255, (24, 24, 3), np.uint8) for _ in range(9)]
    classes = [-1, 3] * 4 + [5]
    together = list(explainer(pixels, classes))
    assert len(together) == 9
    for one, image, k in zip(together, pixels, classes, strict=True):
        for found, expected in zip(next(explainer([image], [k])), one, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert list(explainer([], [])) == []


def test_brighter_is_more():
    heat = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(4, 0)
    drawn = np.asarray(overlay.draw_map(np.full((4, 8, 3), 100, np.uint8), heat).convert("L"), int)
    assert drawn.shape == (112, 224) and (np.diff(drawn[50, 14::28]) > 0).all()
    large = np.zeros((300, 500, 3), np.uint8)
    assert overlay.draw_map(large, np.zeros((300, 500), np.float32)).size == (500, 300)


def test_classes_are_named_or_numbered():
    assert explaining.class_index("", ["b", "0"]) == -1
    assert explaining.class_index("0", ["b", "0"]) == 1  # a name before a number
    assert explaining.class_index("1", ["b", "0"]) == 1
    for name in ("2", "-1", "\u00b2"):
        with pytest.raises(errors.UserError, match=f"Unknown --class {name!r}. .*Known: 0, b."):
            explaining.class_index(name, ["b", "0"])


def command(*args: str) -> subprocess.CompletedProcess:
    """In a process of its own: other commands that tests import have flags of the same names."""
    return forked.run("vitcls.analysis.explain", *args)


def test_command_explains_a_data_set(photos, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.png").write_bytes((photos / "a" / "one.png").read_bytes())
    result = command(f"--checkpoint={ASSET}", f"--data=folder:{tmp_path}/data", "--num_images=3",
                     "--method=rollout", f"--output={tmp_path}/maps")  # fmt: skip
    assert result.stdout == f"3 images, rollout -> {tmp_path}/maps\n", result.stderr
    rows = table(tmp_path / "maps")
    assert [row["image"] for row in rows] == ["test/a/0.png", "test/a/1.png", "test/b/0.png"]
    assert {row["explained"] for row in rows} == {""}  # rollout is of no class
    assert rows[0]["picture"] == "00000_0.png.png"


def test_mistakes_in_the_command(photos, tmp_path):
    def said(*args: str) -> str:
        result = command(*args)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        return result.stderr

    assert "--checkpoint is missing" in said()
    here = [f"--checkpoint={ASSET}", f"--output={tmp_path}/maps"]
    assert "with either --images or --data" in said(*here)
    assert "either --images or --data" in said(*here, "--data=digits", f"--images={photos}")
    assert "--num_images needs --data" in said(*here, "--num_images=2", f"--images={photos}")
    text = said(*here, "--class=A", "--method=rollout", f"--images={photos}")
    assert "--class=A has no effect on --method=rollout" in text
    assert "names no images" in said(*here, f"--images={tmp_path}/none")
    assert "--method" in said(*here, "--method=lime")
    model = ResNet(resnet_config("resnet_mu", num_classes=2, image_size=(16, 16)))
    processor = pretrained.Processor(size=(16, 16), id2label={0: "a", 1: "b"})
    image = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    pretrained.save(tmp_path / "resnet", model, variables, processor)
    text = said(*here, f"--checkpoint={tmp_path}/resnet", "--method=rollout", f"--images={photos}")
    assert "--method=rollout follows attention, but a resnet has none" in text
    assert not (tmp_path / "maps").exists()


def test_mistakes_that_writing_finds_leave_nothing(photos, explainer, tmp_path):
    def failing(sources, **kwargs):
        with pytest.raises(errors.UserError) as error:
            output = str(tmp_path / "maps")
            explaining.write_pictures(explainer, sources, output, class_name="", **kwargs)
        return str(error.value)

    cut = explaining.file_sources([str(photos / "b" / "cut.png")])
    assert "None of the 1 images can be read, such as" in failing(cut)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine.txt").write_text("mine")
    assert "is not an empty folder" in failing(cut)
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["mine.txt"]


def test_answers_that_are_not_finite_are_refused(photos, tmp_path):
    bad = explaining.load_explainer(overflowing(ASSET, tmp_path / "bad"), num_images=2)
    paths = sorted(str(path) for path in photos.rglob("*.png"))
    with pytest.raises(errors.NotFinite, match=MESSAGE.format("3 of 3", f"{photos}/a/one.png, ")):
        sources = explaining.file_sources(paths)
        explaining.write_pictures(bad, sources, str(tmp_path / "maps"), class_name="")
    assert not (tmp_path / "maps").exists()


def test_a_missing_package_is_named(photos, tmp_path):
    program = (
        "import runpy, sys; sys.modules['matplotlib'] = None\n"
        "runpy.run_module('vitcls.analysis.explain', run_name='__main__', alter_sys=True)"
    )
    args = [f"--checkpoint={ASSET}", f"--output={tmp_path}/maps", f"--images={photos}"]
    result = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ASSET.parents[1], text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Pictures need matplotlib: pip install -r requirements-analysis.txt" in result.stderr
