"""Keeps what finished runs came to, and makes a page of all that is kept.

  python -m vitcls.analysis.results docs/results --add=runs/pretraining

FOLDER gets runs/pretraining's results as pretraining.json: of each run its results.json, and from
its manifest the command, commit, versions and devices. FOLDER.md is then made anew of all the files
in FOLDER, without --add as well.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import make_folder, write_json, written_aside

_ADD = flags.DEFINE_list(
    "add", [], "Folders to keep the results of: workdirs, or folders of them such as launch.sweep "
    "leaves; one that is kept under the same name is replaced.",
)  # fmt: skip


def main(folders: list[str]) -> None:
    """Keeps what is to be added, then writes the page."""
    if len(folders) > 1:
        raise UserError(f"{folders[1]!r} is one FOLDER too many: name runs with --add.")
    from vitcls.analysis import kept

    folder = Path(folders[0])
    added = {Path(name).absolute().name: kept.extract(name) for name in _ADD.value}
    make_folder(folder, flag="FOLDER")
    for name, content in added.items():
        write_json(folder / f"{name}.json", content)
    page = folder.absolute().with_name(f"{folder.absolute().name}.md")
    text = kept.to_markdown(folder)
    with written_aside(page) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"-> {page}")


if __name__ == "__main__":
    cli.run(main, arguments="FOLDER")
