# Needs make and a Python 3.11, 3.12 or 3.13 with pip and venv. Everything is installed into .venv*
# folders of the clone:
#
#   .venv               newest Python found: demo, training and inference
#   .venv-test          oldest Python found: all tests, with PyTorch to compare with
#   .venv-smoke-X.Y     every other Python found: smoke tests, without PyTorch
#
# To choose others, after `make clean`: make demo PYTHON=3.12, make test TEST_PYTHON=3.13.
# To use more processes: make test WORKERS=8.

SHELL := /bin/sh
.NOTPARALLEL:

NO_PYTHON = no Python 3.11, 3.12 or 3.13 with venv on PATH or in pyenv; install one (Debian,
NO_PYTHON += Ubuntu: apt install python3-venv)
# Evaluated once, at the first use: `make help` and `make clean` work without Python.
FOUND = $(or $(shell tools/find_python.sh),$(error $(NO_PYTHON)))
VERSIONS = $(eval VERSIONS := $$(FOUND))$(VERSIONS)
PYTHON ?= $(firstword $(VERSIONS))
TEST_PYTHON ?= $(lastword $(VERSIONS))
SMOKE_PYTHONS = $(filter-out $(TEST_PYTHON),$(VERSIONS))
WORKERS ?= 2
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

, := ,
PIP_INSTALL = -m pip install --quiet --quiet --disable-pip-version-check
PYTEST = .venv-test/bin/python -m pytest
PARALLEL = --numprocesses $(WORKERS) --dist loadfile
# The long files begin first.
WHOLE = $(PYTEST) $(PARALLEL) --no-loadscope-reorder --max-worker-restart 0 --durations 10
INPUTS = pyproject.toml hatch_build.py $(wildcard requirements/constraints-*.txt)
# Byte-compiling takes half of an installation's time. The tests' environments leave it to the first
# import, which therefore must be allowed to write .pyc files.
export PYTHONDONTWRITEBYTECODE =

# $(call make_venv,FOLDER,VERSION)
make_venv = echo "Setting up $(1) with Python $(2) ..." && \
	"$$(tools/find_python.sh $(2))" -m venv --clear $(1)
# $(call install,FOLDER,VERSION,ARGUMENTS)
install = $(1)/bin/python $(PIP_INSTALL) --constraint requirements/constraints-$(2).txt $(3)

.PHONY: help setup demo demo-web notebook docs lint format lock clean smoke
.PHONY: test test-fast test-slow test-full test-docs test-install test-processor test-serve test-trl test-browser
.PHONY: test-kits

help:
	@echo "make demo             install, convert the shipped small model, and ask it about images"
	@echo "make demo-web         the same model on a page, in a browser"
	@echo "make setup            install into .venv, nothing else"
	@echo "make notebook         run the notebooks and keep their outputs"
	@echo "make docs             build the documentation as a website, into site/"
	@echo
	@echo "make test-fast        unit and parity tests, in under 4 minutes on two cores"
	@echo "make test             lint, smoke tests on every Python found, then all tests but those below"
	@echo "make test-full        make test, test-slow, test-docs and test-install"
	@echo "make test-slow        runs that are killed at more places, on more processes, or last longer"
	@echo "make smoke            smoke tests, on every Python but that of the other tests"
	@echo "make test-install     documented installations and the wheel, in empty environments"
	@echo "make test-docs        every command of the longer pages, on the small model"
	@echo "make test-processor   exported models in transformers' AutoProcessor; installs torchvision"
	@echo "make test-serve       the server under load, killed and restarted, for some minutes"
	@echo "make test-trl         losses of MPO against trl 0.24; installs pandas and datasets"
	@echo "make test-kits        VLMEvalKit and lmms-eval with this package; installs torchvision"
	@echo
	@echo "make test-browser     the page in Chromium, which must be installed with its driver"
	@echo "make lint             ruff check and ruff format --check; make format fixes what it can"
	@echo "make lock             resolve requirements/constraints-*.txt again, for every Python found"
	@echo "make clean            remove virtual environments, caches and build folders"

setup: .venv/.installed

demo: .venv/.installed
	.venv/bin/python examples/demo.py

demo-web: .venv/.installed
	$(call install,.venv,$(PYTHON),--editable '.[demo$(,)serve]')
	.venv/bin/python examples/demo_web.py

notebook: .venv/.installed
	$(call install,.venv,$(PYTHON),--editable '.[notebook]')
	.venv/bin/jupyter-execute --inplace notebooks/*.ipynb

docs: .venv/.installed
	$(call install,.venv,$(PYTHON),--editable '.[docs]')
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# The suite comes last, so that its summary is the last output.
test: lint
	@$(MAKE) --no-print-directory smoke
	$(WHOLE)

test-full: test
	@$(MAKE) --no-print-directory test-slow test-docs test-install

test-slow: .venv-test/.installed
	$(PYTEST) $(PARALLEL) --max-worker-restart 0 -m slow

test-fast: .venv-test/.installed
	$(PYTEST) $(PARALLEL) -m fast

test-docs: .venv-test/.installed
	$(PYTEST) -m docs tests/test_documented_commands.py

test-install: .venv-test/.installed
	$(PYTEST) -m install tests/test_install.py

test-processor: .venv-processor/.installed
	.venv-processor/bin/python -m pytest -m torchvision tests/test_auto_processor.py

test-serve: .venv-test/.installed
	$(PYTEST) -m serve_load tests/test_serve_load.py

# In a folder of its own, since trl pins packages of the other tests.
test-trl: .venv-test/.installed
	@.venv-test/bin/python $(PIP_INSTALL) --target .venv-trl --no-deps --upgrade trl==0.24.0
	@.venv-test/bin/python $(PIP_INSTALL) --target .venv-trl --upgrade pandas datasets
	PYTHONPATH=.venv-trl $(PYTEST) -m trl tests/test_preference.py

test-kits: .venv-kits/.installed
	.venv-kits/bin/python -m pytest -m kits tests/test_kit*.py

# SCREENSHOTS=DIR keeps images of the page.
test-browser: .venv-test/.installed
	@.venv-test/bin/python $(PIP_INSTALL) selenium
	$(PYTEST) -m browser tests/test_browser.py

smoke:
	@$(if $(SMOKE_PYTHONS),$(MAKE) --no-print-directory $(SMOKE_PYTHONS:%=smoke-%),\
		echo "No Python but $(TEST_PYTHON) found.")

smoke-%: .venv-smoke-%/.installed
	.venv-smoke-$*/bin/python -m pytest $(PARALLEL) -m smoke

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

format: .venv-test/.installed
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

.venv/.installed: $(INPUTS)
	@$(call make_venv,.venv,$(PYTHON))
	@$(call install,.venv,$(PYTHON),--editable '.[demo]')
	@touch $@

.venv-test/.installed: $(INPUTS)
	@$(call make_venv,.venv-test,$(TEST_PYTHON))
	@tools/install_torch.sh .venv-test/bin/python $(TORCH_VERSION) \
		requirements/constraints-$(TEST_PYTHON).txt $(TORCH_INDEX)
	@$(call install,.venv-test,$(TEST_PYTHON),--no-compile --editable '.[dev]')
	@touch $@

.venv-processor/.installed: $(INPUTS)
	@$(call make_venv,.venv-processor,$(TEST_PYTHON))
	@.venv-processor/bin/python $(PIP_INSTALL) --no-compile torch torchvision
	@grep -v '^torch==' requirements/constraints-$(TEST_PYTHON).txt > .venv-processor/constraints.txt
	@.venv-processor/bin/python $(PIP_INSTALL) --no-compile \
		--constraint .venv-processor/constraints.txt --editable '.[smoke]' transformers jinja2
	@touch $@

# VLMEvalKit comes as ms-vlmeval, which is it as a package. Both kits ask for far more than they
# import; KITS_NEED is what they import here.
KITS = lmms-eval==0.7.3 ms-vlmeval==0.0.20
KITS_NEED = accelerate datasets decord evaluate google-genai imageio jieba jinja2 json_repair \
	latex2sympy2_extended Levenshtein loguru lxml math-verify nltk num2words numexpr openai \
	opencv-python-headless openpyxl pandas peft portalocker pydantic pylatexenc pytablewriter \
	python-dotenv pytz qwen-vl-utils regex requests rouge sacrebleu setuptools spacy sty tabulate \
	tenacity termcolor timeout-decorator timm tqdm transformers validators

.venv-kits/.installed: $(INPUTS)
	@$(call make_venv,.venv-kits,$(TEST_PYTHON))
	@.venv-kits/bin/python $(PIP_INSTALL) --no-compile torch torchvision
	@grep -v '^torch==' requirements/constraints-$(TEST_PYTHON).txt > .venv-kits/constraints.txt
	@.venv-kits/bin/python $(PIP_INSTALL) --no-compile --constraint .venv-kits/constraints.txt \
		--editable '.[smoke$(,)video]' $(KITS_NEED)
	@.venv-kits/bin/python $(PIP_INSTALL) --no-compile --no-deps $(KITS)
	@touch $@

.venv-smoke-%/.installed: $(INPUTS)
	@$(call make_venv,.venv-smoke-$*,$*)
	@$(call install,.venv-smoke-$*,$*,--no-compile --editable '.[smoke]')
	@touch $@

# Otherwise make removes the file of a pattern rule at the end, as an intermediate one.
.PRECIOUS: .venv-smoke-%/.installed

# [dev] without PyTorch, of which PyPI has no CPU build for every Python; three packages that it needs
# take its place. peft needs PyTorch, too: only its name and version are added.
LOCKED = '.[docs,documents,internlm,logging,notebook,quant,serve,smoke,storage,video]' transformers ruff beartype \
	openai jinja2 networkx sympy gcp-storage-emulator 'moto[s3]' flask flask-cors
PEFT = accelerate==1.15.0 peft==0.21.2
# Python 3.11 has jax up to 0.10, and 3.13 gets the newest. 3.12 is pinned between them, so that
# each jax is tested.
LOCKED_3.12 = 'jax==0.11.*'

lock:
	@$(MAKE) --no-print-directory $(VERSIONS:%=lock-%)

lock-%:
	@$(call make_venv,.venv-lock,$*)
	@.venv-lock/bin/python $(PIP_INSTALL) --editable $(LOCKED) $(LOCKED_$*)
	@{ echo "# What the tests ran with on Python $*; written by \`make lock\`."; \
	   { .venv-lock/bin/python -m pip freeze --exclude-editable; \
	     printf '%s\n' torch==$(TORCH_VERSION) $(PEFT); } | LC_ALL=C sort --ignore-case; \
	} > requirements/constraints-$*.txt
	@rm -rf .venv-lock

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
