"""Recipes against what is expected of them; the page of results against the files it is made of."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from vitcls.analysis import expectation, kept_results
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.recipes import Expected

ROOT = Path(__file__).parents[2]
CONFIG = """
from vitcls.config import default_config
from vitcls.recipes import Expected

# Student's t of two runs that differ so much leaves nothing outside.
EXPECTED = {"": Expected((0.0, 1.0), 360, "a test"), "other=1": Expected((0.99,) * 3, 360, "it")}

def get_config(arg=""):
    config = default_config()
    config.data.update(source="digits", data_dir=DIGITS, image_size=(8, 8))
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=STEPS, global_batch_size=8)
    config.eval.batch_size = 512
    return config
"""


def share_inside(expected_of, new_of, num_images, *, num=1500):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(num):
        low, high = expectation.prediction_interval(expected_of(rng), num_images)
        inside += low <= new_of(rng) <= high
    return inside / num


def test_a_further_seed_is_inside_as_often_as_is_said():
    def draw(rng, num):
        return rng.normal(0.8, 0.02, num)

    for num in (2, 5):
        share = share_inside(
            lambda rng, num=num: Expected(tuple(draw(rng, num)), 10**6, ""),
            lambda rng: draw(rng, 1)[0],
            10**6,
        )
        assert share == pytest.approx(0.95, abs=0.018)  # three standard errors


def test_where_one_run_is_known_other_images_are_inside_as_often_as_is_said():
    share = share_inside(
        lambda rng: Expected((rng.binomial(2000, 0.9) / 2000,), 2000, ""),
        lambda rng: rng.binomial(1000, 0.9) / 1000,
        1000,
    )
    assert share == pytest.approx(0.95, abs=0.018)


def test_seeds_and_other_images_add_up():
    def run(rng, num_images):
        return rng.binomial(num_images, rng.normal(0.8, 0.01)) / num_images

    share = share_inside(
        lambda rng: Expected(tuple(rng.normal(0.8, 0.01, 6) + rng.normal(0, 0.01)), 1600, ""),
        lambda rng: run(rng, 1000),
        1000,
    )
    assert share > 0.93  # what seeds do to single images is in both, so that it is rather too wide


def test_the_interval_is_that_of_the_textbook():
    values = (0.98, 0.99, 0.985, 0.975, 0.98)  # t of 4 degrees: 2.776 in every table
    half = 2.776445 * np.std(values, ddof=1) * np.sqrt(1 + 1 / 5)
    low, high = expectation.prediction_interval(Expected(values, 360, ""), 360)
    assert (low, high) == pytest.approx((0.982 - half, min(1, 0.982 + half)))


def test_equal_runs_leave_room_for_an_image():
    expected = Expected((0.9, 0.9, 0.9), 100, "here")
    accuracies = (0.88, 0.89, 0.9, 0.91, 0.92)
    assert [expectation.check_accuracy(expected, x, 100)[0] for x in accuracies] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert expectation.prediction_interval(Expected((1.0,), 100, ""), 100)[1] == 1


def test_the_answer_says_why():
    expected = Expected((0.5, 0.6, 0.7), 100, "measured by us")
    is_inside, sentence = expectation.check_accuracy(expected, float("nan"), 100)
    assert not is_inside and sentence.startswith("outside, below: ")
    assert expectation.check_accuracy(expected, 0.65, 100) == (
        True,
        "inside: test accuracy 0.6500 (100 images); 95 of 100 runs are expected between 0.1032 and "
        "1.0000, since 3 runs had 0.6000 (0.5000 to 0.7000): measured by us.",
    )
    one = Expected((0.9,), 100, "a paper", "validation")
    for accuracy, where in ((0.99, "above"), (0.8, "below")):
        sentence = expectation.check_accuracy(one, accuracy, 100)[1]
        assert sentence.startswith(f"outside, {where}: validation accuracy {accuracy:.4f} (100")
        assert sentence.endswith("since one run had 0.9000: a paper.")


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    config, expected = expectation.find_expected("vit_b16:data=tfds:cifar10")
    assert (ROOT / config.split(":")[0]).resolve() == ROOT / "configs/vit_b16.py"
    assert config.endswith(".py:data=tfds:cifar10") and expected.accuracies == (0.9902,)
    (tmp_path / "mine.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert expectation.find_expected("mine.py:other=1")[0] == "mine.py:other=1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "Unknown recipe 'quickstrat'. Did you mean 'quickstart'?"),
        ("no/file.py", "no/file.py does not exist; name a config file, or one of configs/."),
        ("resnet50", "resnet50.py has no expected accuracy .* it has none: its docstring says"),
        ("vit_b16", "accuracy for vit_b16; it has one for vit_b16:data=tfds:cifar10, vit_b16:data"),
        ("broken.py", "broken.py cannot be used: ZeroDivisionError: division by zero"),
    ],
)
def test_recipes_of_which_nothing_is_known_are_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        expectation.find_expected(name)


@pytest.mark.parametrize("name", ["vit_b16", "vit_b32", "vit_l16"])
def test_published_accuracies_are_those_of_the_docstring(name):
    text = (ROOT / f"configs/{name}.py").read_text().split('"""')[1]
    for data in ("cifar10", "cifar100", "imagenet2012"):
        _, expected = expectation.find_expected(f"{name}:data=tfds:{data}")
        assert f"{100 * expected.accuracies[0]:.2f}" in text


def reproduce(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "vitcls.analysis.reproduce", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def make_config(tmp_path, digits_dir, *, steps) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.replace("DIGITS", repr(digits_dir)).replace("STEPS", str(steps)))
    return str(path)


@pytest.mark.slow
def test_the_command_trains_and_answers(digits_dir, tmp_path):
    name, workdir = make_config(tmp_path, digits_dir, steps=1), tmp_path / "run"
    done = reproduce(name, f"--workdir={workdir}", "--set=train.seed=3")
    out, error = done.communicate()
    assert done.returncode == 0, error
    sentence = out.splitlines()[-1]
    assert sentence.startswith("inside: test accuracy 0.")
    assert json.loads((workdir / "reproduced.json").read_text()) == {
        "inside": True, "answer": sentence, "expected": [0.0, 1.0], "set": ["train.seed=3"]
    }  # fmt: skip
    assert json.loads((workdir / "config.json").read_text())["train"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "vit_b16"], "ERROR: 'vit_b16' is one NAME too many"),
        (["quickstart", "--set=lr"], "ERROR: --set=lr is not of the form FIELD=VALUE"),
        (["quickstart", "--set=optim.lrr=1"], "Did you mean 'lr'?"),  # vitcls.main says so
    ],
)
def test_mistakes_end_with_2(tmp_path, arguments, message):
    done = reproduce(*arguments, f"--workdir={tmp_path}/run")
    _, error = done.communicate()
    assert done.returncode == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_and_is_continued(digits_dir, tmp_path, number):
    name, workdir = make_config(tmp_path, digits_dir, steps=300), tmp_path / "run"
    flags = [f"--workdir={workdir}", "--set=log.every_steps=1"]
    started = reproduce(name, *flags)
    while not (workdir / "metrics.jsonl").exists() or not os.path.getsize(
        workdir / "metrics.jsonl"
    ):
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(number)
    out, error = started.communicate()
    assert started.returncode == 75 and "saved after step" in error
    assert "side:" not in out and not (workdir / "reproduced.json").exists()
    again = reproduce(name, *flags)
    out, error = again.communicate()
    assert again.returncode == 0 and "Continuing after step" in error
    assert "inside: test accuracy" in out


@pytest.mark.parametrize(
    ("child", "code"),
    [
        ("sys.exit(75)", 75),
        ("os.kill(os.getpid(), 9)", 137),
        ("signal.signal(15, lambda *_: sys.exit(9)); os.kill(os.getppid(), 15); time.sleep(60)", 9),
    ],
)
def test_exit_codes_and_signals_are_passed_on(child, code):
    child = f"import os, signal, sys, time; {child}"
    program = (
        "import sys\n"
        "from vitcls.analysis import reproduce\n"
        f"sys.exit(reproduce._run([sys.executable, '-c', {child!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == code


def compare(name, workdir, splits):
    """The command, of a run that is finished."""
    workdir.mkdir(exist_ok=True)
    (workdir / "results.json").write_text(json.dumps({"splits": splits}))
    program = (
        "import sys\n"
        "from vitcls import cli\n"
        "from vitcls.analysis import reproduce\n"
        "reproduce._run = lambda command: 0\n"
        "cli.run(reproduce.main, arguments='NAME')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, name, f"--workdir={workdir}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_outside_has_an_exit_code_of_its_own(tmp_path):
    name = make_config(tmp_path, "", steps=1) + ":other=1"
    done = compare(name, tmp_path / "run", {"test": {"accuracy": 0.5, "num_examples": 360}})
    assert done.returncode == 88 and not done.stderr
    assert done.stdout.splitlines()[-1].startswith("outside, below: test accuracy 0.5000")
    assert json.loads((tmp_path / "run/reproduced.json").read_text())["inside"] is False


def test_a_split_that_was_not_measured_is_named(tmp_path):
    done = compare(make_config(tmp_path, "", steps=1), tmp_path / "run", {"validation": {}})
    assert done.returncode == 2
    message = "The run has no test accuracy, but that is the expected one: put 'test' in"
    assert message in done.stderr


def make_run(workdir: Path, *, seed: int, accuracy: float, step: int = 20) -> None:
    """As a run leaves it."""
    workdir.mkdir(parents=True)
    config = default_config().to_dict()
    config["train"].update(seed=seed, total_steps=20)
    splits = {"test": {"num_examples": 50, "accuracy": accuracy}}
    command = ["/home/me/bin/python", "-m", "vitcls.main", "--config=configs/quickstart.py:a=b"]
    files = {
        "config": config,
        "results": {"step": step, "seconds": 10.0 * seed, "splits": splits, "plan": {}},
        "manifest": {
            "command": [*command, f"--config.train.seed={seed}", f"--workdir={workdir}"],
            "git_commit": "0123456789ab", "versions": {"jax": "0.10.2", "python": "3.11"},
            "devices": {"kind": "cpu", "count": 1},
        },
    }  # fmt: skip
    for name, content in files.items():
        (workdir / f"{name}.json").write_text(json.dumps(content))


def results(*arguments):
    return forked.run("vitcls.analysis.results", *map(str, arguments))


def test_the_page_has_what_the_runs_had_and_nothing_of_the_machine(tmp_path):
    accuracies = {1: 0.8, 2: 0.9, 3: 0.7}
    for seed, accuracy in accuracies.items():
        make_run(tmp_path / f"runs/seed{seed}", seed=seed, accuracy=accuracy)
    earlier = "# Results\n\nMade by `python -m vitcls.analysis.results docs/results` of the files"
    (tmp_path / "kept.md").write_text(earlier)
    done = results(tmp_path / "kept", f"--add={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "kept.md").read_text()
    (row,) = [line for line in page.splitlines() if "vitcls.main" in line]
    assert row == (
        "| `python -m vitcls.main --config=configs/quickstart.py:a=b` | test | 50 | 0.8000 | "
        "0.1000 | 0.7000 to 0.9000 | 1, 2, 3 | 20 | 20 | 1 cpu, jax 0.10.2, 01234567 |"
    )
    assert str(tmp_path) not in (tmp_path / "kept/runs.json").read_text()
    assert kept_results.to_markdown(tmp_path / "kept") == page  # which needs the runs no more


def test_what_cannot_be_kept_is_said(tmp_path):
    make_run(tmp_path / "runs/a", seed=1, accuracy=0.5, step=10)
    with pytest.raises(UserError, match="runs/a cannot be kept: at step 10 of 20. Run its command"):
        kept_results.read_results(str(tmp_path / "runs"))
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="kept has no results; add some with --add=WORKDIR."):
        kept_results.to_markdown(tmp_path / "kept")
    (tmp_path / "kept/a.json").write_text('{"runs": [{}]}')
    with pytest.raises(UserError, match="a.json is not a file of vitcls.analysis.results"):
        kept_results.to_markdown(tmp_path / "kept")
    done = results(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2 and "is one FOLDER too many" in done.stderr


def test_the_committed_page_is_the_one_that_the_command_makes():
    assert (ROOT / "docs/results.md").read_text() == kept_results.to_markdown(ROOT / "docs/results")


@pytest.mark.parametrize("argument", ["", "init=pretrained", "init=scratch"])
def test_what_is_expected_of_the_quick_start_is_what_was_measured(argument):
    _, expected = expectation.find_expected(f"quickstart:{argument}" if argument else "quickstart")
    runs = json.loads((ROOT / "docs/results/pretraining.json").read_text())["runs"]
    which = f"quickstart.py:{argument or 'init=pretrained'}"
    splits = [run["results"]["splits"]["test"] for run in runs if run["command"].endswith(which)]
    assert len(splits) == 5
    assert [one["accuracy"] for one in splits] == pytest.approx(expected.accuracies, abs=5e-5)
    assert {one["num_examples"] for one in splits} == {expected.num_images}
