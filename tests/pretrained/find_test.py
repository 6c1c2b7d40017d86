import hashlib
import json
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

from vitcls.errors import UserError
from vitcls.pretrained import find

NAMES = ("config.json", "preprocessor_config.json", "model.safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        content = '{"weight_map": {}}' if name.endswith(".index.json") else name
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model; assign `error` or `names` to change what it answers.

    `asked`, `fetched` and `patterns` are what it was asked for; `config` is the config.json there.
    """
    hub = types.SimpleNamespace(error=None, names=NAMES, cached=False, asked=[], patterns=None)
    hub.fetched, hub.config = [], tmp_path / "fetched.json"
    snapshot = write(tmp_path / "cache" / "snapshots" / COMMIT)

    def model_info(self, repo_id, *, revision=None):
        hub.asked.append((repo_id, revision))
        if hub.error is not None:
            raise hub.error
        files = [types.SimpleNamespace(rfilename=name) for name in hub.names]
        return types.SimpleNamespace(sha=COMMIT, siblings=files)

    def snapshot_download(repo_id, *, revision, allow_patterns=None, local_files_only=False):
        if local_files_only and not hub.cached:
            raise errors.LocalEntryNotFoundError("not cached")
        assert local_files_only or revision == COMMIT
        hub.patterns = allow_patterns
        return str(snapshot)

    def hf_hub_download(repo_id, filename, *, revision):
        assert revision == COMMIT
        hub.fetched.append(filename)
        return str(hub.config)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def hub_error(kind):
    return kind.__new__(kind)  # without the response that its constructor wants


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = write(tmp_path / "model")
    for checkpoint in (folder, str(folder)):
        files = find(checkpoint)
        assert (files.directory, files.source, files.revision) == (folder, str(folder), None)


def test_every_file_that_is_read_has_a_digest(tmp_path):
    folder = write(tmp_path, (*NAMES[:2], "model.safetensors.index.json", "model-1.safetensors"))
    write(tmp_path, ("README.md", "other.safetensors"))
    digests = find(folder).sha256()
    assert set(digests) == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
    }
    assert digests["config.json"] == hashlib.sha256(b"config.json").hexdigest()


@pytest.mark.parametrize(
    ("source", "asked"),
    [("owner/name", ("owner/name", None)), ("owner/name@v1.0", ("owner/name", "v1.0"))],
)
def test_a_hub_id_is_resolved_to_a_commit(hub, source, asked):
    files = find(source)
    assert hub.asked == [asked]
    assert files.revision == files.directory.name == COMMIT
    assert files.source == source


SHARDS = ("model.safetensors.index.json", "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (("flax_model.msgpack",), ("flax_model.msgpack",)),
        (("flax_model.msgpack", "model.safetensors"), ("model.safetensors",)),
        (("flax_model.msgpack", *SHARDS), SHARDS),
        ((*SHARDS, "model.safetensors"), ("model.safetensors",)),
    ],
)
def test_one_form_of_the_weights_is_downloaded_and_read(hub, tmp_path, there, wanted):
    hub.names = (*NAMES[:2], *there, "pytorch_model.bin", "README.md")
    find("owner/name")
    assert hub.fetched == []
    downloaded = set(
        huggingface_hub.utils.filter_repo_objects(hub.names, allow_patterns=hub.patterns)
    )
    assert downloaded == {*NAMES[:2], *wanted}
    assert find(write(tmp_path / "model", hub.names)).sha256().keys() == downloaded


def test_a_cached_model_is_found_without_a_network(hub):
    hub.error, hub.cached = ConnectionError("no route to host"), True
    assert find("owner/name").revision == COMMIT


def test_offline_without_a_cached_copy(hub):
    hub.error = ConnectionError("no route to host")
    with pytest.raises(UserError, match=r"cannot be reached \(no route to host\). Download it whe"):
        find("owner/name")


def test_missing_id(hub):
    hub.error = hub_error(errors.RepositoryNotFoundError)
    with pytest.raises(
        UserError, match="'owner/nme' is neither a folder nor a model of the hub; check"
    ):
        find("owner/nme")


def test_missing_revision(hub):
    hub.error = hub_error(errors.RevisionNotFoundError)
    with pytest.raises(UserError, match="hub model 'owner/name' has no revision 'v9'"):
        find("owner/name@v9")


def test_gated_id(hub):
    hub.error = hub_error(errors.GatedRepoError)
    with pytest.raises(UserError, match="'owner/name' is gated: accept its terms"):
        find("owner/name")


@pytest.mark.parametrize("source", ["google/vit base", "a/b/c", "owner/-name", ""])
def test_misspelt_id(source):
    with pytest.raises(UserError, match="is neither a folder nor a hub id such as google/vit-base"):
        find(source)


@pytest.mark.parametrize("source", ["/no/such/folder", "./model", "~/model/x"])
def test_missing_folder(source):
    with pytest.raises(UserError, match=f"The folder '{source}' does not exist"):
        find(source)


def test_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json, so it is not a checkpoint"):
        find(write(tmp_path, NAMES[1:]))


def test_folder_without_preprocessing(tmp_path):
    folder = write(tmp_path, ("config.json", "model.safetensors"))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"has no preprocessor_config.json, which says how images"):
        find(folder)


TIMM_NAMES = ("config.json", "model.safetensors")
TIMM_CONFIG = '{"architecture": "resnet18", "pretrained_cfg": {}}'


def test_timm_needs_no_preprocessing(hub, tmp_path):
    folder = write(tmp_path / "model", (*TIMM_NAMES, "pytorch_model.bin"))
    (folder / "config.json").write_text(TIMM_CONFIG)
    assert find(folder).sha256().keys() == set(TIMM_NAMES)
    hub.names = (*TIMM_NAMES, "pytorch_model.bin", "README.md")
    hub.config.write_text(TIMM_CONFIG)
    find("timm/resnet18")
    assert hub.fetched == ["config.json"]
    wanted = huggingface_hub.utils.filter_repo_objects(hub.names, allow_patterns=hub.patterns)
    assert set(wanted) == set(TIMM_NAMES)


def test_a_hub_model_without_preprocessing_is_not_downloaded(hub):
    hub.names = TIMM_NAMES
    hub.config.write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"'owner/name' has no preprocessor_config.json, which say"):
        find("owner/name")
    assert hub.fetched == ["config.json"] and hub.patterns is None


def test_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"neither model.safetensors nor .* nor flax_model.msgpack"):
        find(write(tmp_path, NAMES[:2]))


def test_pickle_only_folder(tmp_path):
    with pytest.raises(
        UserError,
        match=r"as a pickle only \(pytorch_model.bin\), which can run .*"
        "model.allow_pickle=True, or allow_pickle=True in Python",
    ):
        find(write(tmp_path, (*NAMES[:2], "pytorch_model.bin")))


def test_pickle_only_hub_model(hub):
    hub.names = (*NAMES[:2], "pytorch_model.bin")
    with pytest.raises(UserError, match=r"'owner/name' has its weights as a pickle only"):
        find("owner/name")


PICKLE_SHARDS = ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin")


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (("pytorch_model.bin", "training_args.bin"), ("pytorch_model.bin",)),
        (PICKLE_SHARDS, PICKLE_SHARDS),
        (("pytorch_model.bin", "model.safetensors"), ("model.safetensors",)),
        (("pytorch_model.bin", "flax_model.msgpack"), ("flax_model.msgpack",)),
    ],
)
def test_pickles_are_read_when_allowed_and_alone(hub, tmp_path, there, wanted):
    hub.names = (*NAMES[:2], *there, "README.md")
    assert find("owner/name", allow_pickle=True).allow_pickle
    downloaded = set(
        huggingface_hub.utils.filter_repo_objects(hub.names, allow_patterns=hub.patterns)
    )
    assert downloaded == {*NAMES[:2], *wanted}
    folder = write(tmp_path / "model", hub.names)
    assert find(folder, allow_pickle=True).sha256().keys() == downloaded


def test_a_cached_pickle_needs_the_same_leave(hub, tmp_path):
    hub.error, hub.cached = ConnectionError("no route to host"), True
    (tmp_path / "cache" / "snapshots" / COMMIT / "model.safetensors").rename(
        tmp_path / "cache" / "snapshots" / COMMIT / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match="as a pickle only"):
        find("owner/name")
    assert find("owner/name", allow_pickle=True).allow_pickle


def test_other_pickles_are_never_read(tmp_path):
    folder = write(tmp_path, (*NAMES[:2], "model.pth"))
    with pytest.raises(UserError, match=r"as a pickle only \(model.pth\)"):
        find(folder, allow_pickle=True)


def test_pickles_without_torch_are_not_downloaded(hub, monkeypatch):
    hub.names = (*NAMES[:2], "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch 2.10 or newer, and there is none; install"):
        find("owner/name", allow_pickle=True)
    assert hub.patterns is None


# Parts of a checkpoint, on this machine


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache as huggingface_hub lays it out; makes a snapshot of these files, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--owner--name"

    def make(names, *, listed=()):
        snapshot = write(model / "snapshots" / COMMIT, names)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(COMMIT)
        if listed:  # what a download of today's huggingface_hub leaves beside it
            entry = TreeCacheEntry(
                size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None
            )
            write_tree_cache(str(model), COMMIT, dict.fromkeys(listed, entry))
        return snapshot

    return make


@pytest.mark.parametrize("source", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_what_we_downloaded_is_enough_offline(cache, source):
    """Of a repository with more files, which huggingface_hub calls an incomplete snapshot."""
    snapshot = cache(NAMES, listed=(*NAMES, "README.md", "pytorch_model.bin"))
    files = find(source)
    assert (files.directory, files.revision) == (snapshot, COMMIT)


INCOMPLETE = (
    r"The download of 'owner/name@main' \(commit 0123.*\) is not complete: .* {}.* It lies in "
    r".*{}, and the Hugging Face hub cannot be reached \(HF_HUB_OFFLINE is set\)\. Download it "
    r"where there is a network: `HF_HUB_OFFLINE=0 hf download owner/name --revision main`; or name"
)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (NAMES[:1], "has no preprocessor_config.json"),
        (NAMES[1:], "has no config.json"),
        (NAMES[:2], "has no weights: neither model.safetensors nor model.safetensors.index.json"),
        (
            (*NAMES[:2], "model.safetensors.index.json", "model-1.safetensors"),
            "has no model-0.safetensors, model-2.safetensors, which model.safetensors.index.json",
        ),
    ],
)
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_part_of_a_download_is_named_with_what_to_type(cache, names, missing, is_listed):
    snapshot = cache(names, listed=("README.md", *NAMES) if is_listed else ())
    if "config.json" in names:
        (snapshot / "config.json").write_text('{"model_type": "vit"}')
    place = {str(number): f"model-{number}.safetensors" for number in range(3)}
    if "model.safetensors.index.json" in names:
        (snapshot / names[2]).write_text(json.dumps({"weight_map": place}))
    with pytest.raises(UserError, match=INCOMPLETE.format(missing, COMMIT)):
        find("owner/name@main")


def test_a_link_to_a_file_that_was_not_downloaded_does_not_count(cache):
    snapshot = cache(NAMES[:2])
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(UserError, match=INCOMPLETE.format("has no weights", COMMIT)):
        find("owner/name@main")


def test_a_revision_that_was_not_downloaded(cache):
    cache(NAMES)
    with pytest.raises(
        UserError,
        match=rf"is not a folder, the cache has no revision 'v2' of it but {COMMIT}, and .*cannot "
        "be reached .*`HF_HUB_OFFLINE=0 hf download owner/name --revision v2`; or name a folder",
    ):
        find("owner/name@v2")


def test_a_model_that_was_not_downloaded(cache, tmp_path):
    with pytest.raises(
        UserError,
        match=rf"nothing of it is in the cache \({tmp_path}/hub\), and .*hf download other/name`",
    ):
        find("other/name")


@pytest.mark.parametrize(
    ("index", "end"),
    [("model.safetensors.index.json", "safetensors"), ("pytorch_model.bin.index.json", "bin")],
)
def test_a_folder_that_lacks_shards(tmp_path, index, end):
    place = {str(number): f"{index.split('.')[0]}-{number}.{end}" for number in range(3)}
    folder = write(tmp_path, (*NAMES[:2], place["1"]))
    (folder / index).write_text(json.dumps({"weight_map": place}))
    with pytest.raises(
        UserError, match=rf"has no {place['0']}, {place['2']}, which {index} names; copy all files"
    ):
        find(folder, allow_pickle=True)


def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path):
    folder = write(tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid ...")
    with pytest.raises(UserError, match="model.safetensors is a pointer of Git LFS, not the file"):
        find(folder)
