"""Comparisons of workdirs: grouping, verdicts, files, and whatever may be wrong with the runs."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests import forked
from vitcls.analysis import comparison, comparison_page, groups
from vitcls.config.fields import default_config
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]
N, K = 400, 4


def make_run(workdir: Path, *, seed=0, lr=0.001, accuracy=0.9, num=N, ids="", steps=20, **fields):
    """A workdir as a run leaves it, whose network is right at random with this accuracy."""
    rng = np.random.default_rng([seed, round(1e6 * lr)])
    config = default_config().to_dict()
    config["train"].update(seed=seed, total_steps=20)
    config["optim"]["lr"] = lr
    for field, value in fields.items():
        group, name = field.split("__")
        config[group][name] = value
    labels = np.random.default_rng(0).integers(0, K, num)
    hard = np.random.default_rng(1).random(num)  # the same for all runs
    is_right = 0.7 * hard + 0.3 * rng.random(num) < accuracy
    logits = 3 * np.eye(K, dtype=np.float32)[np.where(is_right, labels, (labels + 1) % K)]
    (workdir / "predictions").mkdir(parents=True)
    order = rng.permutation(num)  # of the file, which must not matter
    np.savez(
        workdir / "predictions/test.npz", labels=labels[order].astype(np.int32),
        logits=logits[order], ids=np.array([f"{ids}{i}" for i in range(num)])[order],
    )  # fmt: skip
    splits = {"test": {"num_examples": num, "accuracy": float(is_right.mean())}}
    lines = [{"step": s, "train/loss": 1 / s, "holdout/accuracy": 0.5} for s in range(1, 20)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "results.json").write_text(json.dumps({"step": steps, "splits": splits}))
    return is_right


def read(*directories, split="test", metric="accuracy"):
    return comparison.compare_runs(map(str, directories), split=split, metric=metric)


def all_texts(found) -> str:
    """Every file, of which none may fail."""
    files = comparison_page.to_csv(found)
    return "\n".join([comparison_page.to_markdown(found), comparison_page.to_html(found), *files])


def test_groups_are_by_all_that_differs_but_the_seed_and_run_fields():
    def config(seed, lr, **more):
        made = default_config().to_dict()
        made["train"]["seed"], made["optim"]["lr"] = seed, lr
        made["log"]["every_steps"] = 10 + seed  # a run field
        made["optim"].update(more)
        return made

    older = config(2, 0.01)
    del older["optim"]["weight_decay"]  # a version that had not this field
    found = groups.group_by_config([config(1, 0.01), config(0, 0.002), config(0, 0.01), older])
    assert [(one.name, one.fields, one.runs, one.seeds) for one in found] == [
        ("A", {"optim.lr": 0.002}, [1], [0]), ("B", {"optim.lr": 0.01}, [2, 0, 3], [0, 1, 2]),
    ]  # fmt: skip
    assert found[1].label == "B (optim.lr=0.01)"
    named = [config(0, 1.0, name=name) for name in ("sgd", "adamw", "lion")]
    ablation = groups.group_by_config(named)
    assert [one.fields for one in ablation] == [
        {"optim.name": "adamw"}, {"optim.name": "lion"}, {"optim.name": "sgd"}
    ]  # fmt: skip
    two = groups.group_by_config([config(0, 1.0), config(0, 2.0), config(0, 1.0, weight_decay=0.5)])
    assert [one.label for one in two] == [
        "A (the usual values)", "B (optim.weight_decay=0.5)", "C (optim.lr=2.0)"
    ]  # fmt: skip
    many = groups.group_by_config([config(0, float(lr)) for lr in range(1, 30)])
    assert [one.name for one in many[25:]] == ["Z", "AA", "AB", "AC"]


def test_a_sweep_is_compared_and_what_is_unfinished_is_listed(tmp_path):
    for seed in (0, 1, 2):
        make_run(tmp_path / f"optim.lr=0.001,train.seed={seed}", seed=seed, accuracy=0.9)
        make_run(tmp_path / f"optim.lr=0.01,train.seed={seed}", seed=seed, lr=0.01, accuracy=0.7)
    stopped = tmp_path / "optim.lr=0.01,train.seed=3"
    make_run(stopped, seed=3, lr=0.01, steps=10)
    failed = tmp_path / "optim.lr=0.1,train.seed=0"
    failed.mkdir()
    (failed / "asked.json").write_text("{}")
    trials = [
        {"name": failed.name, "state": "failed", "exit_code": 87},
        {"name": "optim.lr=0.1,train.seed=1", "state": "waiting", "exit_code": None},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": trials}))
    found = read(tmp_path)
    assert [one.seeds for one in found.groups] == [[0, 1, 2], [0, 1, 2]]
    assert found.left_out[stopped] == "at step 10 of 20"
    begun = "config.json is missing: the run has not begun"
    assert found.left_out[failed] == f"{begun} (failed with exit code 87)"
    assert found.left_out[tmp_path / "optim.lr=0.1,train.seed=1"] == f"{begun} (waiting)"
    (pair,) = found.pairs
    assert re.fullmatch(
        r"A \(optim.lr=0.001\) is better than B \(optim.lr=0.01\) by \d+\.\d points "
        r"\(95 % interval \d+\.\d to \d+\.\d\)\.",
        pair.sentence,
    )
    assert pair.modelled == "images and seeds, both paired (3 seeds in common)"
    assert "at step 10 of 20" in comparison_page.to_markdown(found)


def test_values_are_the_accuracies_whatever_the_order_of_the_file(tmp_path):
    rights = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    found = read(tmp_path)
    assert found.values == pytest.approx([right.mean() for right in rights])
    assert not found.pairs and len(found.groups) == 1
    assert "nothing but the seed" in all_texts(found)


def test_one_seed_each_is_mcnemars_test(tmp_path):
    a = make_run(tmp_path / "a", lr=0.001, accuracy=0.9)
    b = make_run(tmp_path / "b", lr=0.01, accuracy=0.9)
    (pair,) = read(tmp_path / "a", tmp_path / "b").pairs
    only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
    assert only_a and only_b  # paired by image: not the permutations of the files
    assert pair.difference.p == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert "cannot be told apart" in pair.sentence and "a second seed" in pair.sentence
    assert "not seeds" in pair.modelled


def test_one_seed_each_says_that_other_seeds_may_differ(tmp_path):
    make_run(tmp_path / "a", lr=0.001, accuracy=0.9)
    make_run(tmp_path / "b", lr=0.01, accuracy=0.5, seed=7)
    (pair,) = read(tmp_path).pairs
    assert pair.sentence.endswith(", as far as one seed of A and B can say: others may differ.")


def test_other_seeds_are_compared_unpaired(tmp_path):
    for seed in range(5):
        make_run(tmp_path / str(seed), seed=seed, lr=0.001 if seed < 3 else 0.01)
    (pair,) = read(tmp_path).pairs
    assert pair.modelled == "images, paired, and seeds, unpaired (3 and 2)" and not pair.mcnemar


def test_too_few_seeds_say_how_many_more(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"a{seed}", seed=seed, lr=0.001, accuracy=0.9)
        make_run(tmp_path / f"b{seed}", seed=seed, lr=0.01, accuracy=0.895)
    (pair,) = read(tmp_path).pairs
    assert "cannot be told apart" in pair.sentence
    needed = r"about \d+ more seeds? of each would|more seeds would not help"
    assert re.search(needed, pair.sentence)


@pytest.mark.parametrize("metric", comparison.METRICS)
def test_every_metric_prefers_the_better_group(tmp_path, metric):
    for seed in range(3):
        for lr, accuracy in ((0.001, 0.9), (0.01, 0.5)):
            make_run(tmp_path / f"{lr}-{seed}", seed=seed, lr=lr, accuracy=accuracy, num=200)
    if metric == "top5_accuracy":
        with pytest.raises(UserError, match="top5_accuracy needs more than 5 classes; there are 4"):
            read(tmp_path, metric=metric)
        return
    found = read(tmp_path, metric=metric)
    assert found.pairs[0].sentence.startswith("A (optim.lr=0.001) is better than B")
    assert all_texts(found)


def test_identical_runs_and_runs_without_a_mistake_are_told_as_such(tmp_path):
    for accuracy, folder in ((0.9, tmp_path / "same"), (2.0, tmp_path / "right")):
        for seed in (0, 1):
            for optimizer in ("adamw", "sgd"):
                make_run(
                    folder / f"{optimizer}{seed}", seed=seed, accuracy=accuracy,
                    optim__name=optimizer,
                )  # fmt: skip
        found = read(folder)
        assert found.pairs[0].sentence.endswith(f"they are the same on each of {N} images.")
        assert found.pairs[0].corrected == 1 and all_texts(found)


def test_a_repeated_run_is_no_second_seed(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    found = read(tmp_path, tmp_path / "a")
    assert found.groups[0].seeds == [0] and found.groups[0].runs == [0]
    assert found.left_out == {tmp_path / "b": "it has the config and the seed of another run"}
    assert all_texts(found)


def test_other_images_are_refused_with_the_reason(tmp_path):
    make_run(tmp_path / "a", lr=0.001)
    make_run(tmp_path / "b", lr=0.01, ids="other")
    make_run(tmp_path / "c", lr=0.02, num=N - 1)
    make_run(tmp_path / "d", lr=0.03)
    found = read(tmp_path)
    first, *rest = found.pairs
    assert first.difference and {first.a.name, first.b.name} == {"A", "D"}
    assert first.corrected == first.difference.p  # the only test
    for pair in rest:
        assert pair.difference is None
        assert "not all of their runs were evaluated on the same images" in pair.sentence
    assert all_texts(found)


def test_a_seed_with_other_images_keeps_its_group_from_comparison(tmp_path):
    make_run(tmp_path / "a0", seed=0, lr=0.001)
    make_run(tmp_path / "a1", seed=1, lr=0.001, ids="other")
    make_run(tmp_path / "b", lr=0.01)
    found = read(tmp_path)
    assert found.pairs[0].difference is None and len(found.groups[0].runs) == 2
    assert all_texts(found)


def test_damaged_and_missing_files_are_listed(tmp_path):
    for name in ("good", "cut", "gone", "config", "twice"):
        make_run(tmp_path / name, seed=len(name))
    (tmp_path / "cut/predictions/test.npz").write_bytes(b"PK cut")
    (tmp_path / "gone/predictions/test.npz").unlink()
    (tmp_path / "config/config.json").write_text("{")
    with np.load(tmp_path / "twice/predictions/test.npz") as arrays:
        doubled = {name: np.concatenate([arrays[name]] * 2) for name in arrays}
    np.savez(tmp_path / "twice/predictions/test.npz", **doubled)
    (tmp_path / "good/metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"ste')
    found = read(tmp_path)
    assert [path.name for path in found.workdirs] == ["good"]
    assert {path.name for path in found.left_out} == {"cut", "gone", "config", "twice"}
    assert found.left_out[tmp_path / "config"] == "config.json is damaged"
    assert "same id" in found.left_out[tmp_path / "twice"]
    assert all_texts(found)


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="is neither a workdir nor a folder of workdirs"):
        read(tmp_path)
    with pytest.raises(UserError, match="missing is not a folder; name a workdir"):
        read(tmp_path / "missing")
    make_run(tmp_path / "a", steps=3)
    with pytest.raises(UserError, match="None of the runs can be compared:\n.*at step 3 of 20"):
        read(tmp_path / "a")
    make_run(tmp_path / "b")
    with pytest.raises(UserError, match="None of the runs(?s:.*)there are predictions for test"):
        read(tmp_path / "b", split="holdout")


def test_the_split_that_chose_checkpoints_is_pointed_out(tmp_path):
    make_run(tmp_path / "a", eval__select_split="test")
    make_run(tmp_path / "b", eval__select_split="test", lr=0.01)
    (tmp_path / "a/manifest.json").write_text('{"git_commit": "abc"}')
    found = read(tmp_path)
    chosen, versions = found.notes
    assert "chose their checkpoints on test" in chosen and "several versions" in versions


def test_hostile_values_stay_text(tmp_path):
    hostile = "<img src=x onerror=alert(1)>|`\n[x](y)\u202e"
    make_run(tmp_path / "a", model__pretrained=hostile)
    make_run(tmp_path / "b<i>", model__pretrained="$x^2$")
    found = read(tmp_path)
    page, markdown = comparison_page.to_html(found), comparison_page.to_markdown(found)
    for text in (page, markdown):
        assert "<img" not in text and "<i>" not in text and "\u202e" not in text
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    rows = [line for line in markdown.splitlines() if line.startswith("| A ")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 7  # six cells, and no other


def test_the_command_writes_all_files_and_says_what_is_wrong(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"runs/a{seed}", seed=seed, accuracy=0.9)
        make_run(tmp_path / f"runs/b{seed}", seed=seed, lr=0.01, accuracy=0.5)

    def run(*arguments):
        return forked.run("vitcls.analysis.compare", *arguments)

    output = tmp_path / "out"
    done = run(str(tmp_path / "runs"), f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "# accuracy on test: 4 runs in 2 groups" in done.stdout
    with (output / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["optim.lr"], row["seeds"]) for row in rows] == [
        ("A", "0.001", "2"), ("B", "0.01", "2"),
    ]  # fmt: skip
    with (output / "pairs.csv").open() as file:
        (pair,) = csv.DictReader(file)
    with (output / "runs.csv").open() as file:
        values = {row["workdir"]: float(row["value"]) for row in csv.DictReader(file)}
    a, b = (np.mean([x for path, x in values.items() if f"/{g}" in path]) for g in "ab")
    assert float(pair["difference"]) == pytest.approx(a - b)
    page = (output / "comparison.html").read_text()
    assert page.count("<svg") == 4  # both pictures, two curves
    with Image.open(output / "groups.png") as picture:
        assert picture.format == "PNG" and picture.convert("RGB").getpixel((0, 0)) == (255,) * 3
    assert (output / "comparison.md").read_text().strip() in done.stdout
    again = run(str(tmp_path / "runs"), f"--output={output}")
    assert again.stdout == done.stdout
    wrong = run(str(tmp_path / "runs"), "--metric=acuracy")
    assert wrong.returncode == 2 and "--metric=acuracy" in wrong.stderr
    assert all(metric in wrong.stderr for metric in comparison.METRICS)
