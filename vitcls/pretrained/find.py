"""Where a checkpoint's files are: a folder as it is, or a model of the Hugging Face hub."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from vitcls.errors import STORAGE_ERRNOS, UserError
from vitcls.folders import user_folders
from vitcls.logs.progress import doing
from vitcls.pretrained.families.timm import is_timm
from vitcls.pretrained.files import formats, torch_file
from vitcls.pretrained.files.json_fields import JsonFields

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of image-text models that transformers 5 wrote
_LFS_POINTER = b"version https://git-lfs.github.com/"  # begins a file that Git has not fetched


class _Incomplete(UserError):
    """A file is not there, and may be elsewhere."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of one checkpoint, on this machine."""

    directory: Path
    source: str  # what the user named: a folder, or a hub id with its revision
    revision: str | None = None  # commit of the hub's repository; None for a folder
    allow_pickle: bool = False  # read torch's pickles if there is nothing else

    def sha256(self) -> dict[str, str]:
        """Hexadecimal digest of every file that is read, by name."""
        digests = {}
        patterns = self.patterns()
        for path in sorted(p for pattern in patterns for p in self.directory.glob(pattern)):
            with path.open("rb") as file, doing(f"Hashing {path}"):
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def patterns(self) -> list[str]:
        """Globs of the files to read. Raises `UserError` if they make no checkpoint."""
        patterns = _patterns(
            self.source,
            # Links to nothing are what an interrupted download or copy may leave.
            [path.name for path in self.directory.iterdir() if path.exists()],
            config=lambda: self.directory / CONFIG,
            allow_pickle=self.allow_pickle,
        )
        _check_whole(self.source, self.directory, patterns)
        return patterns


def find(checkpoint: str | Path, *, allow_pickle: bool = False) -> Files:
    """Finds a checkpoint, downloading what is not in the hub's cache.

    Args:
      checkpoint: A folder in Hugging Face's or timm's format, or a hub id: `OWNER/NAME` or
        `OWNER/NAME@REVISION`, the revision a branch, a tag or a commit. A folder comes first.
      allow_pickle: Whether to read torch's pickles (pytorch_model.bin) if there is nothing else.
        torch's restricted unpickler keeps them from running code.

    Raises:
      UserError: the checkpoint is missing or cannot be read.
    """
    source = str(checkpoint)
    folder = Path(source).expanduser()
    if (folder / "checkpoints").is_dir() and (folder / "model" / CONFIG).is_file():
        raise UserError(
            f"{source!r} is the workdir of a run. Write its weights to a folder and name that: "
            f"python -m vitcls.export --checkpoint={source} --format=huggingface --output=FOLDER"
        )
    if source and folder.is_dir():  # Path("") would be the current folder
        files = Files(folder, source, allow_pickle=allow_pickle)
        files.patterns()
        return files
    if isinstance(checkpoint, Path) or source.startswith(("/", ".", "~")):
        raise UserError(f"The folder {source!r} does not exist.")
    return _from_hub(source, allow_pickle)


def _patterns(
    source: str, names: Iterable[str], *, config: Callable[[], Path], allow_pickle: bool
) -> list[str]:
    """Globs of the files to read, among the names of all files of a folder or repository.

    `config` gets the config.json; it is called only if the preprocessing may be in it.

    Raises:
      UserError: they do not make a checkpoint that can be read.
    """
    names = set(names)
    if CONFIG not in names:
        raise _Incomplete(
            f"{source!r} has no {CONFIG}, so it is not a checkpoint in Hugging Face format."
        )
    if names.isdisjoint((PREPROCESSOR, PROCESSOR)) and not is_timm(JsonFields.read(config())):
        raise _Incomplete(
            f"{source!r} has no {PREPROCESSOR}, which says how images are prepared for the "
            "network; add the one it was trained with."
        )
    for name, patterns in formats.readable(allow_pickle=allow_pickle).items():
        if name in names:
            if name in formats.PICKLES:
                torch_file.import_torch()  # complains before anything is downloaded
            return [CONFIG, PREPROCESSOR, PROCESSOR, *patterns]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise UserError(
            f"{source!r} has its weights as a pickle only ({pickles[0]}), which can run code when "
            "it is opened. Convert it to safetensors first; or, where it is a pytorch_model.bin, "
            "let torch read it with safeguards: model.allow_pickle=True, or allow_pickle=True in "
            "Python."
        )
    raise _Incomplete(f"{source!r} has no weights: neither {' nor '.join(formats.FORMATS)}.")


def _check_whole(source: str, directory: Path, patterns: list[str]) -> None:
    """Raises `UserError` if a file of weights is missing or only a pointer to it."""
    for name in patterns:
        if name.endswith(".index.json"):
            missing = [path.name for path in formats.shards(directory / name) if not path.exists()]
            if missing:
                raise _Incomplete(
                    f"{source!r} has no {', '.join(missing)}, which {name} names; copy all files "
                    "of the checkpoint."
                )
        for path in directory.glob(name):
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise _Incomplete(
                        f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` "
                        "in its folder."
                    )


def _from_hub(source: str, allow_pickle: bool) -> Files:
    # Imported here: it takes half a second, which a folder does not need.
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    from huggingface_hub.utils import validate_repo_id

    repo_id, _, revision = source.partition("@")
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(
            f"{source!r} is neither a folder nor a hub id such as google/vit-base-patch16-224, "
            "which may end in @REVISION."
        ) from error
    user_folders.check_home(
        "Models of the Hugging Face hub", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"
    )
    try:
        # The commit first, so that all files are of one state of the repository.
        info = HfApi().model_info(repo_id, revision=revision or None)
        patterns = _patterns(
            source,
            [file.rfilename for file in info.siblings],
            config=lambda: Path(hf_hub_download(repo_id, CONFIG, revision=info.sha)),
            allow_pickle=allow_pickle,
        )
        with doing(f"Downloading {source}"):
            directory = snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns)
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{source!r} is gated: accept its terms on its page of the hub, then log in with "
            "`hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo_id!r} is neither a folder nor a model of the hub; check the spelling, or log "
            "in with `hf auth login` if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"The hub model {repo_id!r} has no revision {revision!r}.") from error
    except Exception as error:  # no network raises many types, which differ between versions
        if getattr(error, "errno", None) in STORAGE_ERRNOS:
            raise
        return _from_cache(source, repo_id, revision, allow_pickle, cause=error)
    return Files(Path(directory), source, info.sha, allow_pickle)


def _from_cache(
    source: str, repo_id: str, revision: str, allow_pickle: bool, *, cause: Exception
) -> Files:
    """The copy that an earlier download left; `cause` says why the hub cannot be asked."""
    from huggingface_hub import errors, snapshot_download

    reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    command = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        reason, command = "HF_HUB_OFFLINE is set", f"HF_HUB_OFFLINE=0 {command}"
    advice = (
        f"the Hugging Face hub cannot be reached ({reason}). Download it where there is a network: "
        f"`{command}`; or name a folder."
    )
    try:
        directory = snapshot_download(repo_id, revision=revision or None, local_files_only=True)
    except errors.IncompleteSnapshotError as error:
        # We download only a part of a repository; the check below looks for that part.
        directory = error.snapshot_path
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{source!r} is not a folder, {_cached_revisions(repo_id, revision)}, and {advice}"
        ) from cause
    commit = Path(directory).name  # of snapshots/COMMIT
    files = Files(Path(directory), source, commit, allow_pickle)
    try:
        files.patterns()
    except _Incomplete as error:
        raise UserError(
            f"The download of {source!r} (commit {commit}) is not complete: {error} It lies in "
            f"{directory}, and {advice}"
        ) from cause
    return files


def _cached_revisions(repo_id: str, revision: str) -> str:
    """Says what the hub's cache has of a model instead of this revision."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    model = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    found = sorted(path.name for path in (model / "snapshots").glob("*"))
    if not found:
        return f"nothing of it is in the cache ({constants.HF_HUB_CACHE})"
    return f"the cache has no revision {revision or 'main'!r} of it but {', '.join(found)}"
