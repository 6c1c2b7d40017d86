"""Makes .venv-peers, the environment of peers that conflict with ours: 1 GB, minutes.

    python -m benchmarks.make_peers

It has transformers 4.57, the last with Flax networks, and exactly our versions of jax, flax and
optax. So `python -m benchmarks.train_step --peer=flax` compares the networks' code alone. Another
call does nothing, or updates the environment to changed versions.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".venv-peers"
PYTHON = FOLDER / "bin" / "python"
SAME = ("jax", "jaxlib", "flax", "optax", "numpy")  # with the same versions as ours


def main() -> None:
    """Makes the environment, or ends with pip's message."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.make_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    packages = [f"{name}=={importlib.metadata.version(name)}" for name in SAME]
    if not PYTHON.exists():
        venv.create(FOLDER, with_pip=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if code := subprocess.run([*install, "transformers>=4.57,<4.58", *packages]).returncode:
        sys.exit(code)
    print(f"{FOLDER}: transformers {_version('transformers')}, {', '.join(packages)}")


def _version(name: str) -> str:
    program = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.check_output([PYTHON, "-c", program], text=True).strip()


if __name__ == "__main__":
    main()
