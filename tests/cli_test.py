"""Exit codes and messages of whatever a user can type wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitcls import cli

ROOT = Path(__file__).parent.parent


def run(*args: str, module: str = "vitcls.main") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("vitcls.main", "config workdir profile coordinator_address num_processes process_id"),
        (
            "vitcls.evaluate",
            "checkpoint data data_dir split labels batch_size tta reject on_error output",
        ),
        ("vitcls.predict", "checkpoint images output top_k reject batch_size"),
        (
            "vitcls.probe",
            "checkpoint data data_dir split train_split holdout per_class seed epochs batch_size "
            "output",
        ),
        (
            "vitcls.soup",
            "checkpoints how output data split data_dir allow_eval_split metric labels batch_size "
            "on_error alpha pretrained",
        ),
        ("vitcls.export", "checkpoint format output"),
        ("vitcls.plan", "config topology arch num_classes num_images json output"),
        ("vitcls.check_data", "data splits data_dir output config"),
        (
            "vitcls.analysis.explain",
            "checkpoint images data split data_dir num_images output method class batch_size",
        ),
        (
            "vitcls.analysis.select",
            "candidates data data_dir train_split holdout per_class seed epochs batch_size output",
        ),
        ("vitcls.analysis.decide", "target_precision target_coverage unknown"),
        ("launch.sweep", "config sweep workdir on jobs metrics dry_run"),
    ],
)
def test_help_lists_the_commands_flags_and_exits_0_without_importing_jax(module, flags):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0
    description, _, listed = result.stdout.partition("\nFlags:\n")
    assert module in description
    found = set(re.findall(r"^  --(\w+): \S", listed, re.MULTILINE))
    assert set(flags.split()) <= found
    # launch's flags for resources are tested with launch.
    assert set(flags.split()) == found or module.startswith("launch")
    assert not re.search(r"\|\s+jax$", result.stderr, re.MULTILINE)


def test_shared_flags_have_the_defaults_and_notes_of_their_command():
    soup, probe, evaluate = (
        run("--help", module=f"vitcls.{name}").stdout for name in ("soup", "probe", "evaluate")
    )
    assert re.search(r"--data: Data set, .* Empty: that of the runs\.$", soup, re.MULTILINE)
    assert re.search(r"--split: .*Empty: the one that the runs chose on", soup)
    assert re.search(r"--checkpoint: Workdir .* Its head, if there is one, is not used\.", probe)
    assert re.search(r"--train_split: .*\(default: train\)", probe)
    assert re.search(r"--split: Split to evaluate; .*\(default: test\)", evaluate)
    assert "REVISION.\n" in evaluate


CONFIG = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--config is missing"),
        ((CONFIG,), "--workdir is missing"),
        (("--wrkdir=x",), "Did you mean: workdir"),
        ((CONFIG, "--workdir=x", "--profile=many"), "--profile=many"),
        ((CONFIG, "--workdir=x", "more"), "Unexpected argument 'more'"),
        (("--config=configs/quikstart.py", "--workdir=x"), "configs/quikstart.py"),
        ((CONFIG, "--workdir=x", "--config.optim.lrr=1"), "Did you mean 'lr'?"),
        ((CONFIG, "--workdir=x", "--config.optm.lr=1"), 'Did you mean "optim"'),
        ((CONFIG, "--workdir=x", "--config.optim.lr=fast"), "fast"),
        ((CONFIG, "--workdir=x", "--config.optim.name=adamv"), "Did you mean 'adam"),
        ((CONFIG, "--workdir=x", "--config.optim.args.ntserov=1"), "Did you mean 'nesterov'?"),
        ((CONFIG, "--workdir=x", "--config.data.crop_scale=('a','b')"), "must be (smallest, larg"),
        ((CONFIG + ":init=scrath", "--workdir=x"), "Did you mean 'scratch'?"),
        ((CONFIG + ":int=scratch", "--workdir=x"), "Did you mean 'init'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_exit_2_with_one_message(args, message):
    result = run(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_mistake_inside_a_config_file_names_its_line(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from vitcls.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optm.lr = 1.0\n"
        "    return config\n"
    )
    result = run(f"--config={path}", "--workdir=x")
    assert result.returncode == 2
    assert "recipe.py, line 4" in result.stderr and "optim" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("", "get_config"),
    ],
)
def test_a_config_file_that_does_not_run_says_why(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    result = run(f"--config={path}", "--workdir=x")
    assert result.returncode == 2
    assert message in result.stderr
    assert "no such field" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        ("UserError('mend it')", 2, "ERROR: mend it"),
        ("Unavailable('no GPU')", 69, "ERROR: no GPU"),
        ("StorageError('no space')", 74, "ERROR: no space"),
        ("OSError(28, 'No space left on device')", 74, "No space left"),
        ("Interrupted('saved')", 75, "saved"),
        ("NonFiniteLoss('nan')", 87, "ERROR: nan"),
        ("RuntimeError('a bug')", 1, "Traceback"),
    ],
)
def test_every_way_to_fail_has_its_code(tmp_path, raised, code, expected):
    (tmp_path / "command.py").write_text(
        "from vitcls import cli\n"
        "from vitcls.errors import *\n"
        f"def main():\n    raise {raised}\n"
        "cli.run(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run(
        [sys.executable, "-m", "command"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == code
    assert expected in result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)


@pytest.mark.parametrize("is_named", [False, True])
def test_compiled_programs_are_kept(tmp_path, is_named):
    program = (
        "from vitcls import cli\n"
        "cli.prepare_jax()\n"
        "import jax\n"
        "print(jax.jit(lambda x: x @ x)(jax.numpy.eye(3))[0, 0])\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "user")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)
    if is_named:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "named")
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True)
    user = list((tmp_path / "user").glob("vitcls/xla/*/*-cache"))
    named = list((tmp_path / "named").glob("*-cache"))
    assert bool(user) != is_named and bool(named) == is_named


def test_sigterm_ends_as_errors_do():
    program = (
        "import os, signal, time\n"
        "from vitcls import cli\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "cli.run(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (143, "cleaned up\n")


def test_a_terminal_of_any_encoding_can_be_printed_to():
    program = """
import logging, sys
from vitcls import cli
def main():
    print("caf\\u00e9 \\udce9")
    logging.getLogger("vitcls").info("\\u732b")
    raise cli.UserError("no \\u732b")
cli.run(main)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stdout == "caf\\xe9 \\udce9\n"
    assert r" \u732b" in result.stderr and result.stderr.endswith("ERROR: no \\u732b\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("module", "args"),
    [
        ("vitcls.main", [CONFIG, "--workdir={folder}/run"]),
        (
            "vitcls.export",
            ["--checkpoint={folder}", "--format=huggingface", "--output={folder}/out"],
        ),
    ],
)
def test_double_precision_is_refused_before_anything_is_made(tmp_path, monkeypatch, module, args):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    result = run(*(arg.format(folder=tmp_path) for arg in args), module=module)
    assert result.returncode == 2, result.stderr
    assert (
        "ERROR: JAX_ENABLE_X64=True computes in float64" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_no_command_is_silent_for_long():
    program = """
import time
from vitcls import cli
from vitcls.logs import progress
progress.LINE_SECS = 0.3
cli.run(lambda: time.sleep(1))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert re.search(r"^\S+ vitcls: 00:00 so far\.$", result.stderr, re.MULTILINE)


def test_libtpu_is_quiet_only_where_there_is_no_tpu(monkeypatch):
    names = ("TF_CPP_MIN_LOG_LEVEL", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    monkeypatch.setattr(cli.os, "environ", environment)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: ["/dev/vfio/0"] * ("vfio" in pattern))
    cli._quieten_libraries()
    assert environment == {"TF_CPP_MIN_LOG_LEVEL": "0"}  # the user's own value stays
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [])
    cli._quieten_libraries()
    assert tuple(environment) == names
