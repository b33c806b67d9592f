# Needs only make and a Python 3.11, 3.12 or 3.13 with pip and venv. Everything is installed into .venv* folders inside the clone:
#
#   .venv               newest Python found: the demo, training and inference
#   .venv-test          oldest Python found: the whole test suite, with PyTorch to compare with
#   .venv-smoke-X.Y     every other Python found: the smoke tests, without PyTorch
#
# Other choices, after `make clean`: make demo PYTHON=3.12, make test TEST_PYTHON=3.13. More processes: make test WORKERS=8.

SHELL := /bin/sh
.NOTPARALLEL:

NO_PYTHON = Python 3.11, 3.12 or 3.13 with venv is needed, on PATH or from pyenv (Debian, Ubuntu: apt install python3-venv)
# Looked for once, at the first use: `make help` and `make clean` work without any Python.
VERSIONS = $(eval VERSIONS := $$(or $$(shell tools/find_python.sh),$$(error $(NO_PYTHON))))$(VERSIONS)
PYTHON ?= $(firstword $(VERSIONS))
TEST_PYTHON ?= $(lastword $(VERSIONS))
SMOKE_PYTHONS = $(filter-out $(TEST_PYTHON),$(VERSIONS))
WORKERS ?= 2
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PIP_INSTALL = -m pip install --quiet --quiet --disable-pip-version-check
INPUTS = pyproject.toml $(wildcard requirements/constraints-*.txt)
# Byte-compiling what is installed takes half of the time. For the tests that is left to the first import, which must be let write it.
export PYTHONDONTWRITEBYTECODE =

# $(call make_venv,FOLDER,VERSION)
make_venv = echo "Setting up $(1) with Python $(2) ..." && "$$(tools/find_python.sh $(2))" -m venv --clear $(1)

.PHONY: help setup demo notebook test test-full test-docs test-install test-processor test-trl smoke lint format lock clean

help:
	@echo "make demo      install, convert the shipped tiny model and ask it about pictures"
	@echo "make test      install, lint, smoke tests on every Python found, then the whole test suite"
	@echo "make test-processor   an exported model in transformers' AutoProcessor; installs torchvision, several GB"
	@echo "make test-docs  every command of the longer pages, on the tiny model; part of make test"
	@echo "make test-install   what the pages install, in an empty environment; part of make test"
	@echo "make test-trl  MPO's losses against trl 0.24; installs pandas and datasets as well"
	@echo "make smoke     only the smoke tests, on every Python but the one that runs the whole suite"
	@echo "make setup     only install, into .venv"
	@echo "make lint      ruff check and ruff format --check; make format fixes what it can"
	@echo "make notebook  run the notebooks and keep their outputs"
	@echo "make docs      build the documentation as a website, into site/"
	@echo "make lock      resolve requirements/constraints-*.txt anew, for every Python found"
	@echo "make clean     remove the virtual environments, caches and build folders"

setup: .venv/.installed

demo: .venv/.installed
	.venv/bin/python examples/demo.py

notebook: .venv/.installed
	.venv/bin/python $(PIP_INSTALL) --constraint requirements/constraints-$(PYTHON).txt --editable '.[notebook]'
	.venv/bin/jupyter-execute --inplace notebooks/*.ipynb

.PHONY: docs
docs: .venv/.installed
	.venv/bin/python $(PIP_INSTALL) --constraint requirements/constraints-$(PYTHON).txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# The whole suite comes last, so that its summary is the last thing printed.
test: lint
	@$(MAKE) --no-print-directory smoke
	@$(MAKE) --no-print-directory test-install
	@$(MAKE) --no-print-directory test-docs
	@$(MAKE) --no-print-directory test-full

test-full: .venv-test/.installed
	.venv-test/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 10

test-docs: .venv-test/.installed
	.venv-test/bin/python -m pytest -m docs tests/test_documented_commands.py

test-install: .venv-test/.installed
	.venv-test/bin/python -m pytest -m install tests/test_install.py

test-processor: .venv-processor/.installed
	.venv-processor/bin/python -m pytest -m torchvision tests/test_auto_processor.py

# Beside the tests' environment: trl pins what they do not.
test-trl: .venv-test/.installed
	@.venv-test/bin/python $(PIP_INSTALL) --target .venv-trl --no-deps --upgrade trl==0.24.0
	@.venv-test/bin/python $(PIP_INSTALL) --target .venv-trl --upgrade pandas datasets
	PYTHONPATH=.venv-trl .venv-test/bin/python -m pytest -m trl tests/test_preference.py

smoke:
	@$(if $(SMOKE_PYTHONS),$(MAKE) --no-print-directory $(SMOKE_PYTHONS:%=smoke-%),echo "No Python but $(TEST_PYTHON) found.")

smoke-%: .venv-smoke-%/.installed
	.venv-smoke-$*/bin/python -m pytest -m smoke

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

format: .venv-test/.installed
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

.venv/.installed: $(INPUTS)
	@$(call make_venv,.venv,$(PYTHON))
	@.venv/bin/python $(PIP_INSTALL) --constraint requirements/constraints-$(PYTHON).txt --editable '.[demo]'
	@touch $@

.venv-test/.installed: $(INPUTS)
	@$(call make_venv,.venv-test,$(TEST_PYTHON))
	@tools/install_torch.sh .venv-test/bin/python $(TORCH_VERSION) requirements/constraints-$(TEST_PYTHON).txt $(TORCH_INDEX)
	@.venv-test/bin/python $(PIP_INSTALL) --no-compile --constraint requirements/constraints-$(TEST_PYTHON).txt --editable '.[dev]'
	@touch $@

.venv-processor/.installed: $(INPUTS)
	@$(call make_venv,.venv-processor,$(TEST_PYTHON))
	@.venv-processor/bin/python $(PIP_INSTALL) --no-compile torch torchvision
	@grep -v '^torch==' requirements/constraints-$(TEST_PYTHON).txt > .venv-processor/constraints.txt
	@.venv-processor/bin/python $(PIP_INSTALL) --no-compile --constraint .venv-processor/constraints.txt --editable '.[smoke]' transformers jinja2
	@touch $@

.venv-smoke-%/.installed: $(INPUTS)
	@$(call make_venv,.venv-smoke-$*,$*)
	@.venv-smoke-$*/bin/python $(PIP_INSTALL) --no-compile --constraint requirements/constraints-$*.txt --editable '.[smoke]'
	@touch $@

# A pattern rule's product would be removed at the end as an intermediate file.
.PRECIOUS: .venv-smoke-%/.installed

# Everything in [dev] but PyTorch, which PyPI does not have as a CPU build for every Python; the three packages it needs stand for it.
# peft asks for PyTorch: it is added by its name and version alone.
LOCKED = '.[internlm,logging,notebook,quant,smoke,storage,video]' transformers ruff beartype jinja2 networkx sympy gcp-storage-emulator 'moto[s3]' flask flask-cors
PEFT = accelerate==1.15.0 peft==0.21.2
# Python 3.11 can have no jax after 0.10 and 3.13 takes the newest; 3.12 is held between them, so that each jax is tested somewhere.
LOCKED_3.12 = 'jax==0.11.*'

lock:
	@$(MAKE) --no-print-directory $(VERSIONS:%=lock-%)

lock-%:
	@$(call make_venv,.venv-lock,$*)
	@.venv-lock/bin/python $(PIP_INSTALL) --editable $(LOCKED) $(LOCKED_$*)
	@{ echo "# What the tests ran with on Python $*; written by \`make lock\`."; \
	   { .venv-lock/bin/python -m pip freeze --exclude-editable; printf '%s\n' torch==$(TORCH_VERSION) $(PEFT); } | LC_ALL=C sort --ignore-case; \
	} > requirements/constraints-$*.txt
	@rm -rf .venv-lock

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
