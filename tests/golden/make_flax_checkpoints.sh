#!/bin/sh
# Makes the environment that make_flax_checkpoints.py needs, then runs it:
#
#   PYTHON=python3.11 tests/golden/make_flax_checkpoints.sh [FOLDER_OF_THE_ENVIRONMENT]
#
# transformers 4.57 is the last with Flax classes, and asks for these old versions of jax and flax,
# which have no wheels for Python 3.12 and newer.
set -eu
venv="${1:-$(mktemp -d)/venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  "transformers==4.57.6" "jax[cpu]==0.4.13" "flax==0.7.0" \
  "numpy==1.26.4" "scipy==1.11.4" "msgpack==1.2.4" "Pillow==11.3.0"
exec "$venv/bin/python" "$(dirname "$0")/make_flax_checkpoints.py"
