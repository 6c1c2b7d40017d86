"""The manifest of a run, and what its continuations add."""

import json
from types import SimpleNamespace

import jax
import pytest

from vitcls.config.fields import default_config
from vitcls.files import write_json
from vitcls.folders.workdir import Workdir
from vitcls.provenance import manifest
from vitcls.step import sharding


def make_run(pretrained: str = "") -> SimpleNamespace:
    config = default_config()
    config.model.pretrained = pretrained
    mesh = sharding.make_mesh(-1, 1)
    return SimpleNamespace(config=config, mesh=mesh, splits=[], files=None)


def test_continuations_are_added_to_the_manifest(tmp_path):
    workdir, run = Workdir(tmp_path), make_run()
    write_json(workdir.manifest, manifest.make_manifest(run, None))
    for step in (10, 20):
        manifest.note_continuation(workdir, run, step=step)
    continued = json.loads(workdir.manifest.read_text())["continued"]
    assert [entry["step"] for entry in continued] == [10, 20]
    assert continued[0]["devices"]["count"] == 8


@pytest.mark.parametrize("left", [None, "", '{"command": ["py'])
def test_a_manifest_that_is_lost_or_cut_is_made_again(left, tmp_path):
    workdir = Workdir(tmp_path)
    if left is not None:
        workdir.manifest.write_text(left)
    manifest.note_continuation(workdir, make_run("google/vit"), step=10)
    content = json.loads(workdir.manifest.read_text())
    assert content["rebuilt"] and content["pretrained"]["source"] == "google/vit"
    assert [entry["step"] for entry in content["continued"]] == [10]


def test_a_continuation_with_other_settings_of_jax_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manifest.log, "propagate", True)
    workdir, run = Workdir(tmp_path), make_run()
    write_json(workdir.manifest, manifest.make_manifest(run, None))
    manifest.note_continuation(workdir, run, step=1)
    assert not caplog.text
    with jax.default_matmul_precision("highest"):
        manifest.note_continuation(workdir, run, step=2)
    assert "JAX_DEFAULT_MATMUL_PRECISION=highest, and None when this run began" in caplog.text
