"""Keeps the results of finished runs, and makes a page of all kept results.

  python -m vitcls.analysis.results docs/results --add=runs/pretraining

FOLDER gets the results of runs/pretraining as pretraining.json: for each run its results.json, and
from its manifest the command, commit, versions and devices. FOLDER.md is then made anew from all
files in FOLDER. Without --add only FOLDER.md is made.
"""

import functools
from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import expand, make_folder, write_json, written_aside
from vitcls.folders import ownership

_ADD = flags.DEFINE_list(
    "add", [], "Folders to keep the results of: workdirs, or folders of them such as launch.sweep "
    "leaves; one that is kept under the same name is replaced.",
)  # fmt: skip


def main(folders: list[str]) -> None:
    """Adds the results, then writes the page."""
    if len(folders) > 1:
        raise UserError(f"{folders[1]!r} is one FOLDER too many: name runs with --add.")
    from vitcls.analysis import kept_results

    folder = Path(folders[0])
    page = folder.absolute().with_name(f"{folder.absolute().name}.md")
    added = {expand(name).absolute().name: str(expand(name)) for name in _ADD.value}
    paths = [*(folder / f"{name}.json" for name in added), page]
    for path in paths:
        ownership.check_file("FOLDER", path, is_own=functools.partial(_is_own, path))
    contents = {name: kept_results.read_results(directory) for name, directory in added.items()}
    make_folder(folder, flag="FOLDER")
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
    text = kept_results.to_markdown(folder)
    with written_aside(page) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"-> {page}")


def _is_own(path: Path) -> bool:
    if path.suffix == ".json":
        return ownership.has_keys(path, "runs")
    # The second one is how earlier versions began the page.
    starts = ("```\npython -m vitcls.analysis.results", "Made by `python -m vitcls")
    return any(ownership.has_text(path, f"# Results\n\n{start}", at_start=True) for start in starts)


if __name__ == "__main__":
    cli.run(main, arguments="FOLDER")
