"""Random data sets with planted oddities, and what is true of them.

Pictures are scikit-learn's digits, enlarged, and pieces of its two photographs; no two are equal.
"""

import csv
import dataclasses
import functools
import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    "ant",
    "bee",
    "cat",
    "dog",
    "élan",
    "fire fox",
    "gnu",
    "Hen",
    "ibis",
    "jay",
    "kiwi",
    "lynx",
)
SPLIT_NAMES = {
    "train": ("train", "Training", "TRAIN", "train_images", "trainset"),
    "validation": ("val", "valid", "Validation", "dev"),
    "test": ("test", "Testing", "TEST", "test_images", "testset"),
}
KINDS = (
    ("png", "RGB"), ("png", "L"), ("png", "P"), ("png", "RGBA"), ("png", "LA"), ("png", "I;16"),
    ("png", "1"), ("jpg", "RGB"), ("jpg", "L"), ("jpeg", "CMYK"), ("gif", "P"), ("bmp", "RGB"),
    ("webp", "RGB"), ("tif", "RGB"), ("jpg", "turned"), ("png", "text"),
)  # fmt: skip
SUFFIXES = ("", ".JPG_large", ".jpg?w=300", "~")  # of images that only their content tells
JUNK = {
    "notes.txt": b"no image",
    ".hidden.png": b"no image",
    "film.mpg": b"\0\0\1\xba",
    "t.h5": b"?",
}


@dataclasses.dataclass
class Picture:
    """One image: its bytes, its class, and the split that it is in; "": the data have no splits."""

    data: bytes
    suffix: str
    label: str
    split: str
    path: str = ""


@functools.cache
def _sources() -> tuple[np.ndarray, list[np.ndarray]]:
    from sklearn import datasets  # seconds, which only the slow test has

    return datasets.load_digits().images, datasets.load_sample_images().images


def _encode(rng: np.random.Generator, number: int, kind: str, mode: str) -> bytes:
    digits, photos = _sources()
    if rng.random() < 0.5:
        pixels = np.kron(digits[number] * 15, np.ones((2, 3))).astype(np.uint8)
    else:
        top, left = rng.integers(0, 380), rng.integers(0, 600)
        pixels = photos[number % 2][top : top + 20, left : left + 24]
    image = Image.fromarray(pixels).convert("RGB")
    options = {}
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options["exif"] = exif
    elif mode == "text":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Comment", "a" * 1_200_000, zip=True)
    else:
        image = image.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.new("L", image.size, 128))
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind), **options)
    return file.getvalue() + number.to_bytes(2)  # no two are equal, whatever the mode keeps


def draw(rng: np.random.Generator) -> list[Picture]:
    """Pictures of 2 to 12 classes, with or without splits."""
    num_classes = int(rng.integers(2, 13))
    names = list(WORDS[:num_classes])
    if rng.random() < 0.4:
        width = int(rng.integers(1, 4))
        names = [f"{k:0{width}}" if rng.random() < 2 else "" for k in range(num_classes)]
    splits = [("", 8)]
    if rng.random() < 0.7:
        splits = [("train", 6), ("test", 3)]
        if rng.random() < 0.3:
            splits.append(("validation", 2))
    numbers = iter(rng.permutation(1797).tolist())
    pictures = []
    for split, most in splits:
        lacking = names[-1] if split == "test" and rng.random() < 0.3 else None
        for name in names:
            for _ in range(0 if name == lacking else int(rng.integers(2, most + 1))):
                kind, mode = KINDS[rng.integers(len(KINDS))]
                suffix = f".{kind}"
                if rng.random() < 0.1:
                    suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
                elif rng.random() < 0.2:
                    suffix = suffix.upper()
                data = _encode(rng, next(numbers), kind, mode)
                pictures.append(Picture(data, suffix, name, split))
    return pictures


def _spell(rng: np.random.Generator, pictures: list[Picture]) -> dict[str, str]:
    """How each split is called."""
    found = dict.fromkeys(picture.split for picture in pictures)
    return {s: str(rng.choice(SPLIT_NAMES[s])) if s else "" for s in found}


def write_folder(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> str:
    """Writes PATH/split/class/image, or without splits, and files that are not images."""
    spelled = _spell(rng, pictures)
    for number, one in enumerate(pictures):
        nested = "deep/er" if rng.random() < 0.1 else ""
        name = f"{rng.choice(['img', 'train', 'x'])}_{number}{one.suffix}"
        one.path = os.path.join(spelled[one.split], one.label, nested, name)
        (root / one.path).parent.mkdir(parents=True, exist_ok=True)
        (root / one.path).write_bytes(one.data)
        if rng.random() < 0.1:
            junk = str(rng.choice(list(JUNK)))
            (root / one.path).with_name(junk).write_bytes(JUNK[junk])
    if rng.random() < 0.2:
        (root / "__MACOSX" / "train").mkdir(parents=True)
        (root / "__MACOSX" / "train" / "._1.png").write_bytes(b"no image")
    return f"folder:{root}"


def write_csv(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> str:
    """Writes a list of images, which all lie in one folder."""
    spelled = _spell(rng, pictures)
    (root / "files").mkdir(parents=True)
    rows = []
    for number, one in enumerate(pictures):
        one.path = f"files/{number}{one.suffix}"
        (root / one.path).write_bytes(one.data)
        label = one.label
        if label.isdecimal():
            one.label = str(int(label))  # as the list's classes are called
        rows.append({"image": one.path, "label": label, "note": f"note {number}"})
        if one.split:
            rows[-1]["split"] = spelled[one.split]
    header = {"image": ["image", "path", "Filename"], "label": ["label", "Class", "target"]}
    header["split"] = ["split", "data set", "Phase", "usage", "whatever"]
    names = {role: str(rng.choice(header.get(role, [role]))) for role in rows[0]}
    order = rng.permutation(list(rows[0])).tolist()
    delimiter = str(rng.choice(list(",;\t")))
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([names[role] for role in order])
        for row in rng.permutation(len(rows)):
            writer.writerow([rows[row][role] for role in order])
    return f"csv:{root}/list.csv"


def write_hf(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> str:
    """Writes what `save_to_disk` writes; splits may number their classes differently."""
    import datasets

    spelled = _spell(rng, pictures)
    labels = sorted({one.label for one in pictures})
    has_names = rng.random() < 0.7
    tables = {}
    for split in spelled:
        chosen = [one for one in pictures if one.split == split]
        values, feature = [one.label for one in chosen], datasets.Value("string")
        if has_names:
            order = rng.permutation(labels).tolist()
            values, feature = [order.index(value) for value in values], None
            feature = datasets.ClassLabel(names=order)
        for row, one in enumerate(chosen):
            one.path = f"{spelled[split] or 'train'}/{row}"
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        images = [{"bytes": one.data, "path": None} for one in chosen]
        tables[spelled[split]] = datasets.Dataset.from_dict(
            {"image": images, "label": values}, features=features
        )
    if not has_names:
        for one in pictures:
            one.label = str(int(one.label)) if one.label.isdecimal() else one.label
    saved = tables[""] if "" in tables else datasets.DatasetDict(tables)
    saved.save_to_disk(str(root / "saved"))
    return f"hf:{root}/saved"


def spoil_folder(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> None:
    """Moves every image to where a split looks like one, but which is not clear."""
    for one in pictures:
        split = one.split or str(rng.choice(["train", "test"]))
        parts = [f"{split}_{'abc'[list(SPLIT_NAMES).index(split)]}", one.label]
        moved = root / Path(*parts) / os.path.basename(one.path)
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.rename(root / one.path, moved)
    for folder in root.iterdir():
        if not folder.name.endswith(("_a", "_b", "_c")):
            shutil.rmtree(folder)


def spoil_csv(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> None:
    """Replaces a label by a text that stands for none."""
    path = root / "list.csv"
    lines = path.read_text().splitlines()
    delimiter = next(sign for sign in ",;\t" if sign in lines[0])
    header = [name.lower() for name in lines[0].split(delimiter)]
    place = next(i for i, name in enumerate(header) if name in ("label", "class", "target"))
    cells = lines[-1].split(delimiter)
    cells[place] = str(rng.choice(["nan", "NA", "None", "-1", ""]))
    path.write_text("\n".join([*lines[:-1], delimiter.join(cells)]) + "\n")


def spoil_hf(root: Path, rng: np.random.Generator, pictures: list[Picture]) -> None:
    """Takes one label away."""
    import datasets

    saved = datasets.load_from_disk(str(root / "saved"))
    tables = dict(saved) if isinstance(saved, dict) else {"": saved}
    name = list(tables)[-1]
    row = int(rng.integers(len(tables[name])))
    tables[name] = tables[name].map(
        lambda one, place: {"label": None if place == row else one["label"]}, with_indices=True
    )
    spoiled = tables[""] if "" in tables else datasets.DatasetDict(tables)
    spoiled.save_to_disk(str(root / "spoiled"))
    shutil.rmtree(root / "saved")
    os.rename(root / "spoiled", root / "saved")


SPOILERS = {"folder": spoil_folder, "csv": spoil_csv, "hf": spoil_hf}
WRITERS = {"folder": write_folder, "csv": write_csv, "hf": write_hf}
