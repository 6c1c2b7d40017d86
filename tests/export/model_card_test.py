"""Model cards: what they claim, and that no name in them can be more than a name."""

import json

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from vitcls import pretrained
from vitcls.config.fields import default_config
from vitcls.export import model_card
from vitcls.models.vit_config import vit_config

HOSTILE = [
    "a | b || c",
    "<script>alert(1)</script>",
    "[link](http://example.org) ![image](x.png) <http://example.org>",
    "`code` *emphasis* __strong__ ~~gone~~ $x$ &lt; \\",
    "---\nlicence: mine\n---\n# title\u2028\u202e\x1b[31m",
    "#hash: {a: [b], 'c': \"d\"} !!python/object:os.system %TAG - ? @x",
]
NETWORK = vit_config("vit_mu4", num_classes=6, image_size=(8, 16))
METRICS = {"num_examples": 60, "accuracy": 0.75, "loss": 0.5, "num_skipped": 2}
METRICS["fingerprint"] = "ab12"


def write_run(workdir, *, name="pets", pretrained=None, **fields):
    """The records of a finished run that selected step 30 of 40."""
    config = default_config()
    config.data.source = f"folder:/home/someone/{name}"
    config.train.total_steps = 40
    config.update_from_flattened_dict(fields)
    data = {"num_examples": 60, "fingerprint": "ab12"}
    environment = {
        "git_commit": None, "versions": {"jax": "0.10.2"},
        "devices": {"kind": name, "count": 8, "processes": 1},
    }  # fmt: skip
    manifest = environment | {
        "data": {"train": data, name: data},
        "pretrained": pretrained,
        "continued": [{"step": 20} | environment],
    }
    results = {"selected_step": 30, "splits": {name: METRICS, "holdout": METRICS}}
    workdir.mkdir()
    for file, content in [("config", config.to_dict()), ("manifest", manifest)]:
        (workdir / f"{file}.json").write_text(json.dumps(content))
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def make_card(origin, *, name="mine", names=tuple("abcdef")) -> ModelCard:
    id2label = dict(enumerate(names))
    text = model_card.make_card(
        name, NETWORK, id2label, origin=origin, library="transformers", usage="Load it.\n"
    )
    return ModelCard(text)


def visible(text: str) -> list[str]:
    """What a reader sees of Markdown, line by line and cell by cell; fails if it is not plain."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    parts = [child for token in tokens for child in token.children or ()]
    assert {part.type for part in parts} <= {"text", "text_special", "softbreak"}
    assert {token.type for token in tokens} <= {
        "inline", "heading_open", "heading_close", "paragraph_open", "paragraph_close",
        *(f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td")
          for end in ("open", "close")),
    }  # fmt: skip
    rows = [token for token in tokens if token.type == "inline"]
    return ["".join(part.content for part in token.children) for token in rows]


def one_line(name: str) -> str:
    for character in "\n\u2028\u202e\x1b":
        name = name.replace(character, " ")
    return name


def test_hostile_names_stay_names(tmp_path):
    started = {"source": "google/vit", "revision": "c0ffee"}
    workdir = write_run(tmp_path / "plain", pretrained=started)
    plain = make_card(model_card.origin_of_run(workdir, step=30))
    for number, name in enumerate(HOSTILE):
        workdir = write_run(
            tmp_path / str(number), name=name.replace("/", ":"),
            pretrained=started | {"source": name},
        )  # fmt: skip
        card = make_card(model_card.origin_of_run(workdir, step=30), name=name, names=HOSTILE)
        shown = visible(card.text)
        assert len(shown) == len(visible(plain.text))  # the same headings, paragraphs and cells
        assert shown[0] == one_line(name).strip()
        assert shown[2] == f"6 classes: {', '.join(map(one_line, HOSTILE))}.".rstrip()
        assert shown.count(one_line(name.replace("/", ":")).strip()) >= 2  # a split, in two tables
        assert card.data.model_name == one_line(name)
        assert card.data.base_model == one_line(name).partition("@")[0]  # before a revision
        assert card.data.eval_results[0].dataset_split == one_line(name.replace("/", ":"))
        assert card.data.to_dict().keys() == plain.data.to_dict().keys()


def test_results_are_those_of_the_step_and_selection_is_no_measurement(tmp_path):
    workdir = write_run(tmp_path / "run")
    card = make_card(model_card.origin_of_run(workdir, step=30))
    found = [(r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [("pets", "accuracy", 0.75), ("pets", "loss", 0.5)]
    assert "| pets | 60 images, 2 skipped | 0.7500 | 0.5000 |" in card.text
    assert "| holdout, which chose the step | 60 images, 2 skipped |" in card.text
    assert model_card.origin_of_run(workdir, step=30).name == f"{workdir}@30"

    (workdir / "results.json").rename(workdir / "elsewhere")
    unfinished = model_card.origin_of_run(workdir, step=30)
    (workdir / "elsewhere").rename(workdir / "results.json")
    for origin in (unfinished, model_card.origin_of_run(workdir, step=40)):
        card = make_card(origin)
        assert card.data.eval_results is None
        assert f"The weights after step {origin.step} have no final evaluation." in card.text


def test_recipe_shows_what_differs_from_the_defaults_and_what_matters_most(tmp_path):
    fields = {"loss.label_smoothing": 0.1, "optim.args.nesterov": True, "data.num_threads": 3}
    text = make_card(model_card.origin_of_run(write_run(tmp_path / "run", **fields), step=30)).text
    assert "| loss.label_smoothing | 0.1 |" in text
    assert "| optim.args.nesterov | True |" in text
    assert "| optim.name | adamw |" in text  # a default
    assert "| train.total_steps | 40 |" in text
    assert "num_threads" not in text  # changes no result
    assert "| pets | 60 | ab12 |" in text
    assert "From step 20: 8 x pets, 1 process(es); commit unknown; jax 0.10.2" in text


@pytest.mark.parametrize(
    ("started", "base_model", "shown"),
    [
        ({"source": "google/vit@main", "revision": "c0ffee"}, "google/vit",
         "from google/vit (commit c0ffee)."),
        ({"source": "/home/someone/vit", "revision": None}, None, "from vit."),
        (None, None, "from random weights."),
    ],
    ids=["hub", "folder", "scratch"],
)  # fmt: skip
def test_the_base_is_named_and_no_path_is(tmp_path, started, base_model, shown):
    workdir = write_run(tmp_path / "run", pretrained=started)
    card = make_card(model_card.origin_of_run(workdir, step=30))
    assert card.data.base_model == base_model
    assert f"trained for 30 steps on folder:pets, {shown}" in card.text
    assert "someone" not in card.content and str(tmp_path) not in card.content


def test_other_checkpoints_have_a_card_of_what_is_known(tmp_path):
    hub = model_card.origin_of_files(pretrained.Files(tmp_path, "google/vit", "c0ffee"))
    folder = model_card.origin_of_files(pretrained.Files(tmp_path, "/home/someone/vit"))
    assert (hub.name, folder.name) == ("google/vit@c0ffee", "/home/someone/vit")
    card = make_card(hub)
    assert card.data.base_model == "google/vit" and card.data.eval_results is None
    assert "with the weights of google/vit (commit c0ffee), unchanged." in card.text
    assert "with the weights of vit, unchanged." in make_card(folder).text
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# mine", "## How to use it", "## Licence"]


def test_of_many_classes_the_first_are_named(tmp_path):
    origin = model_card.origin_of_files(pretrained.Files(tmp_path, "x/y", "c0ffee"))
    text = make_card(origin, names=[f"class{n}" for n in range(1000)]).text
    assert "1000 classes: class0, class1," in text
    assert "class19, ...; config.json has all." in text and "class20" not in text


def test_copied_weights_need_no_records(tmp_path):
    origin = model_card.origin_of_run(tmp_path, step=7)
    assert "The weights after step 7 have no final evaluation." in make_card(origin).text
