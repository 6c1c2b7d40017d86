# Everything on a fresh machine with Python >= 3.11: the first `make` of a kind makes a virtual
# environment and installs what it needs; later ones do so only when a requirements file changed.
#
#   make quickstart    fine-tune the shipped ViT on handwritten digits -> runs/quickstart
#   make test          install the development tools too, run the tests
#   make lint          ruff, without changing a file
#   make fonts         install the fonts of the `glyphs` data set (Debian or Ubuntu)
#
# PYTHON=python3.12 uses another Python, in an environment of its own, .venv-3.12.
# ARGS="-k vit" goes to pytest, or to the quick start's flags.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check
INSTALL_FAILED := { echo "make: installing failed, see pip's message above. It needs a network\
 connection to a Python package index (https://pypi.org, or the one in PIP_INDEX_URL)." >&2; exit 1; }

.PHONY: help quickstart test lint fonts check-python

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

quickstart: $(VENV)/.installed
	$(VENV_PYTHON) -m vitcls.main --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check

fonts: $(VENV)/.installed
	@command -v apt-get >/dev/null || { echo "make: no apt-get here. Install the fonts named in\
	 vitcls/data/glyphs/fonts.py with your system's package manager." >&2; exit 1; }
	$(if $(filter 0,$(shell id -u)),,sudo) apt-get install --yes --no-install-recommends \
	  $$($(VENV_PYTHON) -m vitcls.data.glyphs.fonts)

$(VENV)/.installed: requirements.txt | check-python
	@echo "Installing what a run needs into $(VENV), once: a minute or two, 1.1 GB on disk."
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) cannot make virtual environments. On\
	 Debian or Ubuntu: apt-get install python$(VERSION)-venv" >&2; exit 1; }
	@$(PIP_INSTALL) -r requirements.txt || $(INSTALL_FAILED)
	@touch $@

# torch first and alone: its CPU build is a tenth of the CUDA build that PyPI has for Linux, but not
# every machine reaches the index that serves it. The second line then keeps what the first got.
$(VENV)/.installed-dev: requirements-dev.txt requirements-hf.txt requirements-analysis.txt \
  requirements-heif.txt requirements-tfds.txt requirements-wandb.txt $(VENV)/.installed
	@echo "Installing the development tools into $(VENV), once: 2.5 GB on disk."
	@$(PIP_INSTALL) --retries 1 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
	  $$(grep '^torch==' requirements-dev.txt) || $(INSTALL_FAILED)
	@$(PIP_INSTALL) -r requirements-dev.txt || $(INSTALL_FAILED)
	@touch $@

check-python:
	@test -n "$(VERSION)" || { echo "make: no $(PYTHON) here. Install Python 3.11 or newer, or name\
	 one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is\
	 Python $(VERSION), 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
