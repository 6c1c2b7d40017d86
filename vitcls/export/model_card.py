"""The model card of exported weights: a README.md from the records of a run.

Names of classes, data and checkpoints are not trusted: none may break the YAML or a table, or act
as Markdown or HTML. Paths of this machine are cut to their last part.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.fields import RUN_FIELDS, default_config
from vitcls.config.parse import flatten
from vitcls.files import read_json
from vitcls.folders.workdir import Workdir
from vitcls.provenance.results import count_images

# Fields that are always shown. Others are shown if they differ from their defaults.
_RECIPE = (
    "optim.name", "optim.lr", "optim.schedule", "optim.warmup_steps", "optim.weight_decay",
    "train.total_steps", "train.global_batch_size", "train.seed", "data.image_size", "data.crop",
    "augment.flip", "model.dtype",
)  # fmt: skip
_SAID_ELSEWHERE = ("data.source", "model.pretrained", "train.total_epochs", *RUN_FIELDS)
_MAX_CLASSES = 20  # classes that are named


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights come from; unknown fields are empty.

    Attributes:
      name: The checkpoint for `pretrained.load`, with a fixed step or revision.
      step: The training step of the weights.
      manifest: Content of a run's `manifest.json`; for other checkpoints only "pretrained".
      config: A run's config by field, `{"optim.lr": 0.001}`.
      splits: Metrics of exactly these weights by split, as in a run's `results.json`.
    """

    name: str
    step: int | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The hub id of the model that training began from, without a revision."""
        started = self.manifest.get("pretrained") or {}
        return started["source"].partition("@")[0] if started.get("revision") else None

    @property
    def select_split(self) -> str | None:
        """The split that chose the step."""
        return self.config.get("eval.select_split")


def origin_of_run(workdir: Path, *, step: int) -> Origin:
    """Reads the records of a run, and its results if they are of the weights after `step`."""
    files = Workdir(workdir)
    results = _read_json(files.results)
    return Origin(
        name=f"{workdir}@{step}",
        step=step,
        manifest=_read_json(files.manifest),
        config=flatten(ConfigDict(_read_json(files.config))),
        splits=results["splits"] if results.get("selected_step") == step else {},
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a record. A copied workdir may lack it, since no program needs it."""
    if not path.exists():
        return {}
    return read_json(path, remedy="put a sound copy there, or remove it to do without")


def origin_of_files(files: pretrained.Files) -> Origin:
    """The origin of a folder or of a model of the hub."""
    name = files.source
    if files.revision:
        name = f"{name.partition('@')[0]}@{files.revision}"
    return Origin(
        name, manifest={"pretrained": {"source": files.source, "revision": files.revision}}
    )


def make_card(
    name: str,
    config: pretrained.Config,
    id2label: Mapping[int, str],
    *,
    origin: Origin,
    library: str,
    usage: str,
) -> str:
    """Returns the card: YAML for the hub, then Markdown.

    Args:
      name: Name of the network.
      config: The network's config.
      id2label: Its classes.
      origin: Where its weights come from.
      library: The hub's name of the library that loads the files, such as "transformers".
      usage: Markdown that says how to load them.
    """
    blocks = [
        f"---\n{_metadata(name, config, origin, library=library)}\n---",
        f"# {_text(name)}",
        *_about(config, id2label, origin),
        "## How to use it",
        usage.strip(),
        *_results(origin),
        *_data(origin),
        *_recipe(origin.config),
        *_environment(origin.manifest),
        "## Licence",
        "None is claimed here; the licences of the pretrained weights and of the data apply.",
    ]
    return "\n\n".join(blocks) + "\n"


def _metadata(name: str, config: pretrained.Config, origin: Origin, *, library: str) -> str:
    # Importing this takes half a second, which other users of this module should not wait for.
    from huggingface_hub import EvalResult, ModelCardData

    data = _line(_public_source(origin))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=data,
            dataset_split=_line(split),
            metric_type=metric,
            metric_value=value,
        )
        for split, summary in origin.splits.items()
        if split != origin.select_split  # the split that chose the weights cannot measure them
        for metric, value in summary.items()
        if _is_metric(metric)
    ]
    return ModelCardData(
        model_name=_line(name),
        library_name=library,
        pipeline_tag="image-classification",
        tags=["image-classification", config.family, "vitcls"],
        base_model=origin.hub_id and _line(origin.hub_id),
        eval_results=results or None,
    ).to_yaml()


def _about(config: pretrained.Config, id2label: Mapping[int, str], origin: Origin) -> list[str]:
    weights, started = "random weights", origin.manifest.get("pretrained")
    if started:
        weights = _text(origin.hub_id or Path(started["source"]).name)
        weights += f" (commit {started['revision']})" if started["revision"] else ""
    made = f"with the weights of {weights}, unchanged"
    if origin.step is not None:
        made = f"trained for {origin.step} steps on {_text(_public_source(origin))}, from {weights}"
    height, width = config.image_size
    names = [_text(id2label[index]) for index in sorted(id2label)[:_MAX_CLASSES]]
    more = ", ...; config.json has all" if len(id2label) > len(names) else ""
    return [
        f"An image classifier ({config.family}, {height} x {width} pixels), {made}.",
        f"{len(id2label)} classes: {', '.join(names)}{more}.",
    ]


def _results(origin: Origin) -> list[str]:
    if origin.step is None:
        return []
    if not origin.splits:
        none = f"The weights after step {origin.step} have no final evaluation."
        return ["## Results", none]
    metrics = [name for name in next(iter(origin.splits.values())) if _is_metric(name)]
    rows = [
        (
            split + (", which chose the step" if split == origin.select_split else ""),
            count_images(summary),
            *(f"{summary[metric]:.4f}" for metric in metrics),
        )
        for split, summary in origin.splits.items()
    ]
    table = _table(("split", "measured on", *metrics), rows)
    return ["## Results", f"The weights after step {origin.step}:", table]


def _is_metric(name: str) -> bool:
    return name != "fingerprint" and not name.startswith("num_")


def _data(origin: Origin) -> list[str]:
    splits = origin.manifest.get("data")
    if not splits:
        return []
    rows = [(name, split["num_examples"], split["fingerprint"]) for name, split in splits.items()]
    table = _table(("split", "images", "fingerprint"), rows)
    return ["## Data", f"Source: {_text(_public_source(origin))}.", table]


def _recipe(config: Mapping[str, Any]) -> list[str]:
    if not config:
        return []
    defaults = json.loads(json.dumps(default_config().to_dict()))  # tuples become lists
    defaults = flatten(ConfigDict(defaults))
    others = [name for name in config if name not in (*_RECIPE, *_SAID_ELSEWHERE)]
    shown = [*_RECIPE, *(name for name in others if config[name] != defaults.get(name))]
    table = _table(("field", "value"), [(name, config.get(name)) for name in shown])
    return [
        "## Recipe",
        "Fields of vitcls' config. Fields that are not shown have their defaults.",
        table,
    ]


def _environment(manifest: Mapping[str, Any]) -> list[str]:
    if "devices" not in manifest:
        return []
    lines = []
    for part in ({"step": 0, **manifest}, *manifest["continued"]):
        devices = part["devices"]
        lines.append(
            f"From step {part['step']}: {devices['count']} x {devices['kind']}, "
            f"{devices['processes']} process(es); commit {part['git_commit'] or 'unknown'}; "
            + ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        )
    return ["## Environment", *map(_text, lines)]


def _public_source(origin: Origin) -> str:
    """The data's source without its parent folders, which are private to a machine."""
    kind, colon, path = str(origin.config.get("data.source", "")).partition(":")
    return f"{kind}:{Path(path).name}" if kind == "folder" else f"{kind}{colon}{path}"


def _table(names: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    header, *lines = (f"| {' | '.join(map(_text, row))} |" for row in (names, *rows))
    return "\n".join([header, "|---" * len(names) + "|", *lines])


def _text(value: Any) -> str:
    """One line with Markdown and HTML escaped; underscores within words need no escape."""
    special = r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(f"({special})", r"\\\1", _line(value))


def _line(value: Any) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(value))
