"""Names of splits, of their folders and of the columns that name them.

Common names are recognised. Other names that look like splits are refused: dividing such data anew
would put test images into training.
"""

import collections
import re
from collections.abc import Collection, Iterable, Mapping

from vitcls.errors import UserError, unknown

# Spellings by role, in lower case. A name may have other words from `FILLERS` and numbers in it.
SPELLINGS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
    "holdout": ("holdout",),
}
_ROLES = {spelling: role for role, spellings in SPELLINGS.items() for spelling in spellings}
FILLERS = frozenset(
    (
        "set", "sets", "data", "dataset", "split", "splits", "image", "images", "imgs", "img",
        "photo", "photos", "picture", "pictures", "pics", "folder", "dir", "files", "samples",
    )
)  # fmt: skip
# Columns that name the splits, without regard to case, spaces, hyphens and underscores.
COLUMNS = ("split", "splits", "subset", "partition", "set", "dataset", "phase", "usage", "fold")
# Columns among them whose values may be any names.
_FREE_COLUMNS = ("split", "splits", "subset", "partition")
# Columns of yes and no, such as is_valid, and the roles of their rows.
FLAG_COLUMNS = {
    f"{prefix}{spelling}": role
    for role in ("train", "validation", "test")
    for spelling in SPELLINGS[role]
    for prefix in ("is", "in")
}
_YES, _NO = frozenset(("1", "true", "yes", "y", "t")), frozenset(("0", "false", "no", "n", "f"))


def role_of(name: str) -> str:
    """The role of a name such as "Training", "test_images" or "valset"; "": not certain."""
    role, rest = _parse(name)
    return role if not rest else ""


def _parse(name: str) -> tuple[str, str]:
    """The role that a name contains, "" if none or several, and its other words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[\W\d_]+", spaced.lower()) if word]
    roles, rest = set(), []
    for word in words:
        glued = re.fullmatch(rf"(.+?)(?:{'|'.join(FILLERS)})", word)
        role = _ROLES.get(word) or (glued and _ROLES.get(glued[1]))
        if role:
            roles.add(role)
        elif word not in FILLERS:
            rest.append(word)
    return (roles.pop() if len(roles) == 1 else ""), " ".join(rest)


def find_roles(names: Iterable[str]) -> dict[str, str]:
    """Returns the `names` that stand for splits, with their roles.

    Besides single names, two or more that differ in the role only are recognised together, such as
    "seg_train" and "seg_test".
    """
    parsed = {name: _parse(name) for name in names}
    roles_by_rest: dict[str, set[str]] = {}
    for role, rest in parsed.values():
        if role:
            roles_by_rest.setdefault(rest, set()).add(role)
    return {
        name: role
        for name, (role, rest) in parsed.items()
        if role and (not rest or len(roles_by_rest[rest]) > 1)
    }


def find_suspects(names: Iterable[str]) -> list[str]:
    """Returns the `names` that contain the name of a split and are not recognised."""
    names = list(names)
    found = find_roles(names)
    return [name for name in names if _parse(name)[0] and name not in found]


def offered(names: Collection[str]) -> dict[str, str]:
    """Returns the name by which each split can be opened -> its own name, one of `names`.

    The only one for training is "train", and the only one for testing "test", however it is
    spelled. All others have their own names, and validation splits their usual spellings.
    """
    roles = find_roles(names)
    counts = collections.Counter(roles.values())
    splits = {}
    for name in names:
        role = roles.get(name, "")
        usual = role == "validation" and name in _ROLES
        is_only = role and counts[role] == 1 and not usual
        splits[role if is_only else name] = name
    return splits


def find(where: str, split: str, names: Collection[str]) -> str:
    """Returns the one of `names` that `split` means, by itself or by its role.

    Args:
      where: Begins the message, such as "split of PATH".
      split: A name, or any spelling of a role.
      names: The known names.

    Raises:
      UserError: It could mean none or several of them.
    """
    splits = offered(names)
    if split in names or split in splits:
        return split if split in names else splits[split]
    role = role_of(split)
    same = [name for name, one in find_roles(names).items() if role and one == role]
    if len(same) > 1:
        raise UserError(
            f"{where} {split!r} could be {', '.join(map(repr, sorted(same)))}: name one of them."
        )
    if not same:
        raise unknown(where, split, splits)
    return same[0]


def flag_role(column: str, values: Collection[str]) -> str:
    """The role of rows with "yes" in a column such as "is_valid"; "": another kind of column."""
    lower = {value.strip().lower() for value in values}
    role = FLAG_COLUMNS.get(_normal(column)) or role_of(column)
    return role if role and lower <= _YES | _NO and lower & _YES and lower & _NO else ""


def flag_split(role: str, value: str) -> str:
    """The split of a row with this value in a column of `role`."""
    if value.strip().lower() in _YES:
        return role
    return "test" if role == "train" else "train"


def find_column(where: str, how: str, columns: Mapping[str, Collection[str]]) -> str:
    """Returns the column that names the splits, or "".

    Args:
      where: Begins the message.
      how: How the source names a column, such as "csv:PATH?split=".
      columns: Different values of each column that is not used otherwise; empty: more than a few.

    Raises:
      UserError: Several columns could name them, or one looks so without values of splits.
    """
    found = [name for name, values in columns.items() if _tells_splits(name, values)]
    if len(found) > 1:
        raise UserError(
            f"{where}: columns {', '.join(map(repr, found))} could all tell the splits; choose "
            f"one: {how}{found[0]}, or {how} divides the images anew."
        )
    unclear = [
        name
        for name, values in columns.items()
        if values and _normal(name) in set(COLUMNS) - {"dataset"}
    ]
    if found or not unclear:
        return found[0] if found else ""
    values = ", ".join(sorted(columns[unclear[0]]))
    raise UserError(
        f"{where}: column {unclear[0]!r} seems to divide the images, but its values {values} do "
        f"not say which of them to train on. Say {how}{unclear[0]} to have splits of these names, "
        f"or {how} to divide the images anew."
    )


def _tells_splits(column: str, values: Collection[str]) -> bool:
    name, roles = _normal(column), find_roles(values)
    if name in _FREE_COLUMNS or flag_role(column, values):
        return True
    if name in COLUMNS:
        return bool(roles or find_suspects(values))
    # Under any other name, every value must be that of a split, and there must be several.
    return len(roles) == len(values) and len(set(roles.values())) > 1


def _normal(column: str) -> str:
    return re.sub(r"[\W_]+", "", column.lower())
