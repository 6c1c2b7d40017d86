#!/bin/sh
# Makes the environment that make_timm_outputs.py needs, then runs it:
#
#   PYTHON=python3.11 tests/golden/make_timm_outputs.sh [FOLDER_OF_THE_ENVIRONMENT]
set -eu
venv="${1:-$(mktemp -d)/venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
# torch first and alone: its CPU build, where its index can be reached, is a tenth of PyPI's.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps \
  --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  "torch==2.13.0" "torchvision==0.28.0" "timm==1.0.31" "numpy==2.4.6" "pillow==13.0.0"
exec "$venv/bin/python" "$(dirname "$0")/make_timm_outputs.py"
