"""Writes the table of docs/data.md from what the code recognises: `python -m tests.recognised`."""

from pathlib import Path

from vitcls.data import images
from vitcls.data.sources import csv_file, image_files, split_roles

PAGE = Path(__file__).parent.parent / "docs/data.md"
_START, _END = "<!-- made by `python -m tests.recognised` -->\n", "<!-- end -->\n"
# Suffixes of the package that reads HEIC, which may not be installed.
_HEIF = {".heic", ".heics", ".heif", ".heifs", ".hif"}


def table() -> str:
    """The table's lines."""

    def code(names) -> str:
        return ", ".join(f"`{name}`" for name in names)

    rows = [
        (f"folders, splits and values for {role}", code(spellings))
        for role, spellings in split_roles.SPELLINGS.items()
    ]
    rows += [
        ("the same with other words", "in any case, with numbers, and with "
         + code(sorted(split_roles.FILLERS))),
        ("columns of splits", code(split_roles.COLUMNS)
         + ", of any name if every value is a split's; yes and no in `is_valid`, `is_test`, ..."),
        *((f"columns of the {role}", code(names)) for role, names in csv_file.COLUMNS.items()),
        ("suffixes of images", code(sorted(set(image_files.suffixes()) - _HEIF))),
        ("with " + images.HEIF_ADVICE, code(sorted(image_files.HEIF_SUFFIXES))),
        ("other or no suffix",
         "by content: JPEG, PNG, GIF, BMP, WebP, TIFF, JPEG 2000, AVIF, HEIC"),
        ("never images", code(sorted(image_files.OTHER_SUFFIXES))),
        ("folders that are left out", "hidden ones, " + code(sorted(image_files.SYSTEM_FOLDERS))),
    ]  # fmt: skip
    return (
        "\n".join(["| what | recognised |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
        + "\n"
    )


def page(text: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}{table()}{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
