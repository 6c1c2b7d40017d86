"""Which checkpoint is taken, what is said of the others, and what may be wrong with them."""

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from overflow import MESSAGE, overflowing
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from tests import forked
from tests.probe.features_test import Steps, save_checkpoint, save_images
from vitcls.analysis import candidates, paired, selection, selection_page
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.models.resnet import resnet_config
from vitcls.models.vit_config import vit_config
from vitcls.pretrained import Processor, make_model
from vitcls.pretrained.reading import variable_shapes
from vitcls.probe import features, fitting
from vitcls.step import sharding

ROOT = Path(__file__).parents[2]
N, S = 200, 5


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(candidates, "_WINDOW_SECS", 0.01)


def candidate(name, probe, *, knn=0.5, gflops=1.0, num=N) -> candidates.Candidate:
    """Of given accuracies: always right on the first images."""
    costs = candidates.Costs((8, 8), 1000, gflops, 1234.4, 32)
    hits = np.arange(num) < round(probe * num)
    return candidates.Candidate(
        name, S * hits, S, (np.arange(num) < round(knn * num)) * 1,
        {"k": 1, "lr": 0.1, "weight_decay": 0.0}, costs,
    )  # fmt: skip


def choose(*found) -> selection.Selection:
    return selection.Selection(selection.rank(found), {}, len(found[0].probe), 10)


def names(found: selection.Selection) -> list[str]:
    return [row.candidate.name for row in found.rows]


# The statistics


def test_the_test_of_signs_is_mcnemars_for_right_and_wrong():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 60)) < rng.random((2, 1))
        found = paired.sign_flips(a.astype(int) - b)
        assert found == pytest.approx(paired.mcnemar(a, b), rel=1e-9)


@pytest.mark.parametrize("num", [1, 2, 7, 12])
def test_the_test_of_signs_is_scipys_over_all_choices_of_them(num):
    rng = np.random.default_rng(num)
    for _ in range(5):
        values = rng.integers(-5, 6, num)
        expected = stats.permutation_test(
            (values,), np.sum, permutation_type="samples", n_resamples=np.inf
        ) if num > 1 else None  # fmt: skip
        by_hand = np.mean([
            abs(np.dot(signs, np.abs(values))) >= abs(values.sum())
            for signs in itertools.product((1, -1), repeat=num)
        ])  # fmt: skip
        assert paired.sign_flips(values) == pytest.approx(by_hand)
        if expected:
            assert paired.sign_flips(values) == pytest.approx(expected.pvalue)


def test_the_test_of_signs_of_no_difference_and_of_many():
    assert paired.sign_flips(np.zeros(9, int)) == 1
    assert paired.sign_flips(np.zeros(0, int)) == 1
    assert paired.sign_flips(np.full(60, 5)) == pytest.approx(2 * 0.5**60)
    values = np.random.default_rng(0).integers(-5, 7, 20_000)
    z = values.sum() / math.sqrt((values**2).sum())
    assert paired.sign_flips(values) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.05)


def test_false_alarms_are_as_rare_as_promised():
    """Two candidates that are as good, on 400 draws of the images."""
    rng = np.random.default_rng(0)
    alarms = [
        paired.sign_flips(np.subtract(*rng.binomial(5, rng.random(80) ** 0.2, (2, 80)))) <= 0.05
        for _ in range(400)
    ]
    assert np.mean(alarms) <= stats.binom.ppf(0.999, 400, 0.05) / 400


# Ranking


def test_the_best_probe_is_taken_whatever_the_order():
    given = [candidate("a", 0.5), candidate("b", 0.9), candidate("c", 0.7), candidate("d", 0.1)]
    for order in itertools.permutations(given):
        found = choose(*order)
        assert names(found) == ["b", "c", "a", "d"]
        assert [row.is_worse for row in found.rows] == [False, True, True, True]


def test_ties_go_to_neighbours_then_to_the_cheaper_then_to_the_first():
    same = [
        candidate("dear", 0.8, knn=0.7, gflops=9.0),
        candidate("cheap", 0.8, knn=0.7, gflops=2.0),
        candidate("unknown", 0.8, knn=0.7, gflops=math.inf),
        candidate("also cheap", 0.8, knn=0.7, gflops=2.0),
        candidate("neighbours", 0.8, knn=0.9, gflops=99.0),
    ]
    found = choose(*same)
    assert names(found) == ["neighbours", "cheap", "also cheap", "dear", "unknown"]
    assert not any(row.is_worse for row in found.rows)
    assert all(row.p == 1 for row in found.rows[1:])
    assert all(row.behind.value == row.behind.high == 0 for row in found.rows)


def random_candidates(rng: np.random.Generator) -> list[candidates.Candidate]:
    found = []
    for i in range(rng.integers(1, 7)):
        one = candidate(f"candidate-{i}", 0, gflops=float(rng.choice([1, 2, 4])), num=60)
        skill = rng.choice([0.6, 0.65, 0.95])
        found.append(
            candidates.Candidate(
                one.name, rng.binomial(S, skill, 60), S, rng.binomial(1, skill, 60), one.chosen,
                one.costs,
            )
        )  # fmt: skip
    return found


def test_properties_of_any_selection():
    rng = np.random.default_rng(0)
    told_apart = []
    for _ in range(40):
        given = random_candidates(rng)
        found = choose(*given)
        assert sorted(names(found)) == sorted(one.name for one in given)
        values = [row.probe.value for row in found.rows]
        assert values == sorted(values, reverse=True)
        text = selection.sentence(found)
        assert text.startswith(f"Take {names(found)[0]}:")
        alike = text.partition("Cannot be told apart from it: ")[2].partition(".")[0]
        for row in found.rows:
            one = row.candidate
            assert row.probe.value == pytest.approx(one.probe.mean() / S)
            assert row.knn.value == pytest.approx(one.knn.mean())
            assert row.probe.low <= row.probe.value <= row.probe.high
            assert row.behind.value == pytest.approx(values[0] - row.probe.value)
            if row is found.rows[0]:
                assert math.isnan(row.p) and not row.is_worse
                continue
            told_apart.append(row.is_worse)
            assert (one.name in alike.split(", ")) == (not row.is_worse)
            raw = paired.sign_flips(found.rows[0].candidate.probe - one.probe)
            assert raw <= row.p <= min(1, raw * len(given))
    assert 0.1 < np.mean(told_apart) < 0.9


def test_intervals_are_scipys_bootstraps():
    rng = np.random.default_rng(0)
    given = candidate("a", 0.0)
    given = candidates.Candidate(
        "a", rng.binomial(S, 0.8, N), S, rng.binomial(1, 0.7, N), given.chosen, given.costs
    )
    (row,) = selection.rank([given])
    for estimate, values in ((row.probe, given.probe / S), (row.knn, given.knn)):
        expected = stats.bootstrap(
            (values,), np.mean, n_resamples=5000, method="percentile", rng=1
        ).confidence_interval
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), abs=0.01)


def test_all_right_and_all_wrong_still_have_an_interval():
    best, worst = selection.rank([candidate("a", 1.0), candidate("b", 0.0)])
    bound = 0.05 ** (1 / N)  # the accuracy with which N of N are right once in 20 times
    assert (best.probe.low, best.probe.high) == pytest.approx((bound, 1))
    assert (worst.probe.low, worst.probe.high) == pytest.approx((0, 1 - bound))
    assert (worst.behind.low, worst.behind.high) == (1, 1)


# What is said


def test_sentences():
    alone = selection.sentence(choose(candidate("a", 0.9)))
    assert "right on 90.0 % of 200 held-out images (95 % interval 8" in alone
    assert alone.endswith("Nothing else is compared with it.")
    two = selection.sentence(choose(candidate("a", 0.9), candidate("b", 0.5)))
    assert two.endswith("It is better than the other one.")
    three = selection.sentence(
        choose(candidate("a", 0.9), candidate("b", 0.5), candidate("c", 0.4))
    )
    assert three.endswith("It is better than each of the 2 others.")


def test_a_cheaper_one_that_cannot_be_told_apart_is_named():
    text = selection.sentence(
        choose(
            candidate("large", 0.9, gflops=35.1), candidate("small", 0.895, gflops=9.2),
            candidate("as large", 0.895, gflops=35.1), candidate("tiny", 0.3, gflops=1.3),
        )
    )  # fmt: skip
    assert "Cannot be told apart from it: small, as large." in text
    assert "The cheapest of these is small: 9.2 GFLOPs for an image instead of 35.1." in text
    assert "tiny" not in text
    other = selection.sentence(choose(candidate("large", 0.9), candidate("as large", 0.895)))
    assert "cheapest" not in other


def test_neighbours_that_would_choose_otherwise_are_mentioned():
    text = selection.sentence(choose(candidate("a", 0.9, knn=0.4), candidate("b", 0.5, knn=0.8)))
    assert text.endswith("By nearest neighbours b would be first.")


def test_the_files_hold_what_was_found():
    found = choose(candidate("a", 0.9, gflops=35.1), candidate("b", 0.88, gflops=math.inf))
    found.left_out["./c"] = "There is no folder './c'."
    rows = list(csv.DictReader(io.StringIO(selection_page.to_csv(found))))
    assert [row["candidate"] for row in rows] == ["a", "b", "./c"]
    assert float(rows[0]["probe"]) == 0.9 and float(rows[0]["gflops"]) == 35.1
    assert (rows[0]["p_holm"], rows[1]["is_worse"], rows[2]["probe"]) == ("", "False", "")
    assert float(rows[1]["behind"]) == pytest.approx(0.02)
    assert rows[2]["left_out"] == "There is no folder './c'."
    markdown = selection_page.to_markdown(found)
    assert "| 1 | a | 0.900 (0.8" in markdown and "| 2.0 (" in markdown
    assert "| 0.001 | 35.1 | 1,234 | 8 x 8 |" in markdown  # parameters, GFLOPs, images/s
    assert "| 0.001 | – | 1,234 | 8 x 8 |" in markdown
    assert "- ./c: There is no folder './c'." in markdown
    assert selection.sentence(found) in markdown


def test_hostile_names_stay_one_cell_and_one_label():
    name = "a|b `c`\n$x^2$ <img src=x> \u202e \U0001f600 " + "d" * 300
    found = choose(candidate(name, 0.9), candidate("e", 0.8))
    line = next(s for s in selection_page.to_markdown(found).splitlines() if s.startswith("| 1 |"))
    assert line.replace("\\|", "").count("|") == 11 and "<img" not in line
    assert next(csv.DictReader(io.StringIO(selection_page.to_csv(found))))["candidate"] == name
    svg = selection_page.to_pictures(found)["svg"].decode()
    assert "<img" not in svg and "…" + "d" * 69 in svg


@pytest.mark.parametrize(
    ("num", "gflops"), [(1, (1.0,)), (9, (1.3, 4.6, 35.1)), (2, (1.0, math.inf)), (2, (math.inf,))]
)
def test_pictures_are_drawn_of_any_costs(num, gflops):
    given = [candidate(f"runs/{i}", 0.9 - i / 20, gflops=gflops[i % len(gflops)]) for i in
             range(num)]  # fmt: skip
    pictures = selection_page.to_pictures(choose(*given))
    with Image.open(io.BytesIO(pictures["png"])) as image:
        assert image.width > 700
    assert all(f">{i + 1}  runs/{i}<" in pictures["svg"].decode() for i in range(num))


# What is measured


def backbone_of(config) -> features.Backbone:
    """Of zeros: costs do not depend on the weights."""
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(config))
    processor = Processor(size=config.image_size)
    return features.Backbone(make_model(config), variables, processor, sharding.make_mesh(-1, 1))


def vit_gflops(tokens: int, width: int, *, pooled: int) -> float:
    """Of the products of 12 layers with patches of 16 and an MLP four times as wide.

    Each token has its q, k, v and output, (4 + 8) width^2 multiply-adds with the MLP, and a score
    and a value for each other one. After the last layer only `pooled` tokens are read: the others
    have but a k and a v there.
    """
    layer = tokens * 12 * width**2 + 2 * tokens**2 * width
    last = (2 * tokens + 10 * pooled) * width**2 + 2 * pooled * tokens * width
    patches = (tokens - 1) * 3 * 16**2 * width
    return 2e-9 * (11 * layer + last + patches)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("cls", vit_gflops(197, 768, pooled=1)),
        ("mean", vit_gflops(197, 768, pooled=197)),
    ],
)
def test_the_compilers_gflops_are_the_formulas(pool, expected):
    config = vit_config("vit_b16", num_classes=0, image_size=(224, 224))
    counted = candidates.count_gflops(backbone_of(dataclasses.replace(config, pool=pool)))
    assert expected < counted < 1.02 * expected  # what is no product adds a little
    if pool == "mean":  # the published figure, where the last layer is whole
        assert expected == pytest.approx(105.4 / 3, rel=0.001)  # a third of a training step's


@pytest.mark.slow
def test_resnet50s_gflops_are_the_published_ones():
    """torchvision's table has 4.09e9 multiply-adds; XLA leaves out those with padding."""
    config = resnet_config("resnet50", num_classes=0, image_size=(224, 224))
    assert 0.96 * 2 * 4.09 < candidates.count_gflops(backbone_of(config)) < 2 * 4.09


def test_costs_are_of_the_network_without_a_head(tmp_path):
    backbone = features.load_backbone(save_checkpoint(tmp_path / "checkpoint"))
    costs = candidates.measure_costs(backbone, num_images=20)
    params = jax.tree.leaves(backbone.variables["params"])
    assert costs.num_params == sum(leaf.size for leaf in params)
    assert not any("classifier" in name for name in backbone.variables["params"])
    assert costs.image_size == (8, 8) and 0 < costs.images_per_second < 1e7


def test_heads_are_those_of_sklearn():
    """Of the hyper-parameters that were chosen, trained to the end."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))

    def part(num: int) -> features.Features:
        labels = rng.integers(0, 3, num, np.int32)
        values = centres[labels] + 1.2 * rng.normal(size=(num, 6))
        return features.Features(values.astype(np.float32), labels)

    parts = {"train": part(90), "validation": part(60), "test": part(400)}
    costs = candidates.Costs((8, 8), 1, 1.0, 1.0, 1)
    found = candidates.fit_heads("a", parts, costs, num_classes=3, num_epochs=100)
    knn = KNeighborsClassifier(
        found.chosen["k"], metric="cosine", weights=lambda distances: np.exp(-distances / 0.07)
    ).fit(*parts["train"])
    hits = knn.predict(parts["test"].features) == parts["test"].labels
    assert np.mean(hits == found.knn) >= 0.995  # votes may tie up to rounding
    scaler = StandardScaler().fit(parts["train"].features)
    decay = max(found.chosen["weight_decay"], 1e-9)
    theirs = LogisticRegression(C=1 / (decay * 90), max_iter=2000)
    theirs.fit(scaler.transform(parts["train"].features), parts["train"].labels)
    accuracy = theirs.score(scaler.transform(parts["test"].features), parts["test"].labels)
    assert found.probe.mean() / found.num_seeds == pytest.approx(accuracy, abs=0.03)
    assert found.num_seeds == fitting.NUM_SEEDS


def test_parts_are_disjoint_and_of_the_training_split(tmp_path):
    save_images(tmp_path / "train", 90)
    split = sources.open_split(f"folder:{tmp_path}", "train")
    parts = selection.divide(split, holdout=0.2, per_class=0, seed=0)
    ids = {name: {part.id(i) for i in range(len(part))} for name, part in parts.items()}
    assert {name: len(found) for name, found in ids.items()} == {
        "train": 65, "validation": 7, "test": 18,
    }  # fmt: skip
    assert len(set().union(*ids.values())) == 90
    few = selection.divide(split, holdout=0.2, per_class=4, seed=0)
    assert few["train"].class_counts().tolist() == [4, 4, 4]
    assert few["test"].fingerprint == parts["test"].fingerprint
    assert selection.divide(split, holdout=0.2, per_class=0, seed=1)["test"].fingerprint != (
        parts["test"].fingerprint
    )


# The command


def run(*args: str) -> subprocess.CompletedProcess:
    return forked.run("vitcls.analysis.select", *args)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    save_images(root / "train", 120)
    (root / "test" / "ant").mkdir(parents=True)
    (root / "test" / "ant" / "1.png").write_bytes(b"never read")
    return root


@pytest.fixture(scope="module")
def selected(data, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    """The folder of the checkpoints and of the output, the arguments, and how the command ended."""
    root = tmp_path_factory.mktemp("selected")
    for seed, name in enumerate(("one", "two", "cut", "nan")):
        save_checkpoint(root / name, seed=seed)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])
    weights = root / "nan" / "model.safetensors"
    spoil(weights)
    args = [
        f"--data=folder:{data}", f"--output={root / 'out'}", "--epochs=5", "--holdout=0.3",
        "--candidates=" + ",".join(f"{root}/{name}" for name in ("cut", "one", "nan", "two", "no")),
    ]  # fmt: skip
    return root, args, run(*args)


def spoil(weights: Path) -> None:
    """Makes one number of a safetensors file a NaN."""
    content = bytearray(weights.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    start = header["vit.layernorm.weight"]["data_offsets"][0] + 8 + size
    content[start : start + 4] = np.float32(np.nan).tobytes()
    weights.write_bytes(content)


def test_broken_candidates_are_listed_and_the_others_ranked(selected):
    root, _, result = selected
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((root / "out" / "selection.csv").open()))
    assert [Path(row["candidate"]).name for row in rows[2:]] == ["cut", "nan", "no"]
    assert {Path(row["candidate"]).name for row in rows[:2]} == {"one", "two"}
    assert float(rows[0]["probe"]) >= float(rows[1]["probe"]) > 0.4
    for row, why in zip(
        rows[2:], ("model.safetensors", "not finite", "does not exist"), strict=True
    ):
        assert why in row["left_out"] and f"{row['candidate']}: " in result.stdout
    assert (root / "out" / "selection.md").read_text() in result.stdout
    with Image.open(root / "out" / "selection.png") as image:
        image.verify()
    assert (root / "out" / "selection.svg").read_text().count("<svg") == 1
    assert not list((root / "out").glob("*.tmp"))
    assert "Candidate 5 of 5" in result.stderr


def test_a_candidate_that_overflows_is_left_out(selected, data, tmp_path):
    root, _, _ = selected
    parts = selection.divide(
        sources.open_split(f"folder:{data}", "train"), holdout=0.3, per_class=0, seed=0
    )
    hot, one = str(overflowing(root / "one", tmp_path / "hot")), str(root / "one")
    found = selection.select([hot, one], parts, folder=root / "out" / "features", num_epochs=5)
    assert [row.candidate.name for row in found.rows] == [one]
    assert re.search(MESSAGE.format("76 of 76", "train/"), found.left_out[hot])


def test_a_second_call_computes_the_features_of_new_candidates_only(selected, data, monkeypatch):
    root, _, _ = selected
    folder = root / "out" / "features"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 6  # three parts of two; the one that is not finite is refused unused
    computed, extract = [], features.extract
    monkeypatch.setattr(
        features, "extract", lambda *args, **kw: computed.append(args) or extract(*args, **kw)
    )
    save_checkpoint(root / "new", seed=7)
    parts = selection.divide(
        sources.open_split(f"folder:{data}", "train"), holdout=0.3, per_class=0, seed=0
    )
    given = [str(root / name) for name in ("one", "new", "two")]
    found = selection.select(given, parts, folder=folder, num_epochs=5)
    assert [len(split) for _, split in computed] == [76, 8, 36]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    first = {row["candidate"]: row for row in csv.DictReader((root / "out/selection.csv").open())}
    for row in found.rows:
        if row.candidate.name != given[1]:
            assert float(first[row.candidate.name]["knn"]) == row.knn.value
            assert float(first[row.candidate.name]["probe"]) == pytest.approx(row.probe.value)


def test_an_interrupted_call_resumes_in_the_middle_of_a_candidate(
    selected, data, monkeypatch, tmp_path
):
    root, _, _ = selected
    monkeypatch.setattr(
        selection, "fit_heads", lambda name, *args, **kw: candidate(name, 0.5, num=36)
    )
    steps, given = Steps(monkeypatch), [str(root / name) for name in ("one", "two")]
    parts = selection.divide(
        sources.open_split(f"folder:{data}", "train"), holdout=0.3, per_class=0, seed=0
    )

    def select(folder: str) -> dict[str, bytes]:
        selection.select(given, parts, folder=tmp_path / folder, num_epochs=5, batch_size=8)
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    whole = select("whole")
    assert steps.num == 2 * (10 + 1 + 5)
    with steps.interrupted_after(16 + 4):
        select("features")
    assert select("features") == whole
    assert steps.num == 12


def test_without_any_candidate_that_can_be_used_it_is_a_mistake(selected, data, tmp_path):
    root, _, _ = selected
    split = sources.open_split(f"folder:{data}", "train")
    parts = selection.divide(split, holdout=0.3, per_class=0, seed=0)
    names = [f"{root}/cut", f"{tmp_path}/nowhere"]
    with pytest.raises(UserError, match="None of the candidates can be used:") as error:
        selection.select(names, parts, folder=tmp_path / "features", num_epochs=1)
    assert all(f"  {name}: " in str(error.value) for name in names)


def test_an_image_that_cannot_be_read_is_no_candidates_fault(tmp_path):
    save_images(tmp_path / "train", 60)
    (tmp_path / "train" / "bee" / "001.png").write_bytes(b"no image")
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    split = sources.open_split(f"folder:{tmp_path}", "train")
    parts = selection.divide(split, holdout=0.2, per_class=0, seed=0)
    with pytest.raises(UserError, match="bee/001.png"):
        selection.select([str(checkpoint)], parts, folder=tmp_path / "features", num_epochs=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--candidates is missing"),
        (("--candidates=x",), "--data is missing"),
        (("--candidates=x", "--data=digits"), "--output is missing"),
        (("--candidates=x,,y", "--data=digits", "--output=o"), "has an empty name"),
        (("--candidates=x,y, x", "--data=digits", "--output=o"), "names x twice"),
        (("--candidates=x", "--data=digits", "--output=o", "--holdout=1"), "--holdout=1.0 must be"),
        (("--candidates=x", "--data=digits", "--output=o", "--epochs=0"), "--epochs=0"),
        (("--candidates=x", "--data=folder:{data}", "--output=o", "--per_class=99"),
         "Cannot take 99 examples of every class"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_mistakes_exit_2_before_any_candidate_is_read(args, message, data):
    result = run(*(arg.format(data=data) for arg in args))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "Candidate 1" not in result.stderr
