"""Which files of a folder are images, by suffix and by content, for every command."""

import io
import os
import pathlib

import pytest
from PIL import Image

from vitcls.data import images
from vitcls.data.sources import image_files
from vitcls.errors import UserError
from vitcls.predict import rows


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, kind)
    return file.getvalue()


def listed(root: pathlib.Path) -> list[str]:
    return [path for path, _ in image_files.list_images(str(root)).images]


KINDS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "HEIF"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["n02123045_1", "photo.jpg?w=300", "photo.jpg~", "photo.JPG_large"]
)
def test_files_without_a_known_suffix_are_images_by_their_content(tmp_path, kind, name):
    (tmp_path / name).write_bytes(encoded(kind))
    assert listed(tmp_path) == [name]
    assert images.decode((tmp_path / name).read_bytes()).size == (8, 8)


def test_a_cut_image_without_a_suffix_is_listed_and_not_lost(tmp_path):
    (tmp_path / "cut").write_bytes(encoded("JPEG")[:40])
    assert listed(tmp_path) == ["cut"]


@pytest.mark.parametrize(
    "name",
    ["film.mpg", "film.mpeg", "table.h5", "table.hdf", "drawing.eps", "page.ps", "page.pdf",
     "shape.wmf", "notes.txt", "raw.nef", "raw.DNG", "noise", "noise.xyz"],
)  # fmt: skip
def test_other_files_are_counted_and_not_images(tmp_path, name):
    (tmp_path / name).write_bytes(b"II*\0" * 9 if "raw" in name else b"no image")
    (tmp_path / "a.jpg").write_bytes(b"")
    listing = image_files.list_images(str(tmp_path))
    assert [path for path, _ in listing.images] == ["a.jpg"]
    assert sum(listing.unused.values()) == 1


def test_the_reasons_are_said_with_numbers(tmp_path, monkeypatch):
    for name in ("1.HEIC", "2.HEIC", "3", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    monkeypatch.setattr(images, "HAS_HEIF", False)
    monkeypatch.setattr(image_files, "_image_suffixes", lambda: {".jpg"})
    text = image_files.describe_unused(image_files.list_images(str(tmp_path)).unused)
    parts = sorted(text.split(", "))
    assert parts == [
        "1 file .txt (not images)", "1 file without suffix (not images by their content)",
        "2 files .HEIC (to read them: pip install -r requirements-heif.txt)",
    ]  # fmt: skip
    (tmp_path / "4").write_bytes(encoded("HEIF"))
    listing = image_files.list_images(str(tmp_path))
    assert (
        listing.unused["without suffix (to read them: pip install -r requirements-heif.txt)"] == 1
    )


def test_heic_is_read_where_the_package_is_installed(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(encoded("HEIF"))
    assert listed(tmp_path) == ["IMG_1.HEIC"]
    assert images.decode(encoded("HEIF")).getpixel((4, 4))[0] > 150


def test_heic_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    with pytest.raises(
        images.ImageError, match="HEIC needs a package: pip install -r requirements-"
    ):
        images.decode(encoded_heif)


encoded_heif = encoded("HEIF")


def test_a_drawing_that_a_program_would_have_to_run_is_not_decoded():
    with pytest.raises(images.ImageError, match="cannot identify its format"):
        images.decode(encoded("EPS"))


def test_what_is_not_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(b"")
    listing = image_files.list_images(str(tmp_path))
    assert [path for path, _ in listing.images] == ["a.jpg"]
    assert listing.unused == {"special files, such as pipes": 1}


def test_folders_of_systems_are_left_out(tmp_path):
    for name in ("__MACOSX", "@eaDir", "cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    assert image_files.subfolders(str(tmp_path)) == ["cat"]
    assert listed(tmp_path) == ["cat/1.jpg"]


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_links_to_a_folder_above_are_not_followed_by_predict(tmp_path, target):
    root = tmp_path / "deep" / "photos"
    (root / "a").mkdir(parents=True)
    (tmp_path / "private.jpg").write_bytes(b"")
    for name in ("1.jpg", "a/2.jpg"):
        (root / name).write_bytes(b"")
    (root / "a" / "up").symlink_to(target)
    expected = [f"{root}/1.jpg", f"{root}/a/2.jpg"]
    assert rows.find_images(str(root)) == expected
    assert rows.find_images(f"{root}/**/*.jpg") == expected
    listing = image_files.list_images(str(root), is_strict=False)
    assert listing.unused == {"links to a folder that they are in": 1}
    with pytest.raises(UserError, match="a/up is a symbolic link to a folder that it is in"):
        image_files.list_images(str(root))


def test_broken_links_are_kept_for_predict_to_report(tmp_path):
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    assert rows.find_images(str(tmp_path)) == [f"{tmp_path}/gone.jpg"]


@pytest.mark.parametrize("source", ["{}", "{}/**/*.jpg", "{}/*/*.jpg"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch, source):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):  # a test may run as root, whom modes do not stop
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="b cannot be listed: no permission"):
        rows.find_images(source.format(tmp_path))


def test_patterns_name_what_the_shell_would(tmp_path):
    for name in ("1.jpg", "a/2.jpg", "a/b/3.png", ".hidden/4.jpg", "a/.5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def match(pattern: str) -> list[str]:
        found = image_files.match_pattern(f"{tmp_path}/{pattern}")
        return [os.path.relpath(path, tmp_path) for path in found]

    assert match("**/*.jpg") == ["1.jpg", "a/2.jpg"]
    assert match("**") == ["1.jpg", "a/2.jpg", "a/b/3.png"]
    assert match("*/*/*") == ["a/b/3.png"]
    assert match("a/[0-9].jp?") == ["a/2.jpg"]
    assert match(".hidden/*") == [".hidden/4.jpg"]
    assert match("a/.*") == ["a/.5.jpg"]
    assert match("nothing/*.jpg") == []
