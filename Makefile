# Everything runs in .venv, made on first use; a stamp in it says what is installed.
#
#   make demo                  train on Moby-Dick, evaluate, sample: at most five minutes of training
#   make serve                 serve the model of the demo (it is trained first, if need be)
#   make test                  the test suite, without the slow tests
#   make test-clients          other people's clients, as they are, and a browser
#   make lint                  style, types, import rules
#   make docs                  the docs as a site, in site/
#   make demo PYTHON=python3.12 VENV=/tmp/venv      every variable below can be set like this

VENV        ?= .venv
PYTHON      ?= python3.13 python3.12 python3.11 python3
JOBS        ?= 2
DEMO_ARGS   ?=
SERVE_ARGS  ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# True for an interpreter that can make the environment and that we support.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: help demo serve test test-slow test-newest test-clients lint docs format hooks clean
.NOTPARALLEL:

help: ## list what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

demo: $(VENV)/.installed-run ## train on the bundled Moby-Dick, evaluate it, sample from it
	$(BIN)/tvq demo $(DEMO_ARGS)

serve: $(VENV)/.installed-run ## serve the model of the demo, at http://127.0.0.1:8000; SERVE_ARGS: more options
	[ -d runs/demo/checkpoints ] || $(BIN)/tvq demo $(DEMO_ARGS)
	$(BIN)/tvq serve --run runs/demo $(SERVE_ARGS)

test: $(VENV)/.installed-test ## run the tests, without the slow ones
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" --durations=15 $(PYTEST_ARGS)

# The demo first and alone: it trains for five minutes of the clock. Programs are made as users' are.
DEMO_TEST := tests/cli/test_demo.py
test-slow: $(VENV)/.installed-test ## run the slow tests
	$(BIN)/python -m pytest -n 0 -m slow $(PYTEST_ARGS) $(DEMO_TEST) || [ $$? = 5 ] # 5: none was chosen
	TVQ_TEST_AS_USERS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow $(PYTEST_ARGS) --durations=15 --ignore=$(DEMO_TEST)

# With the newest JAX that we support, which needs a Python above 3.11: a part of the suite that meets
# every compiled program, in an environment of its own.
NEWEST      := $(VENV)-newest
NEWEST_JAX  := 0.12.0.1
NEWEST_ARGS ?= tests/nn/test_reference.py tests/nn/test_products.py tests/ops/test_train.py \
               tests/ops/test_sample.py tests/engine/test_score.py tests/measure/test_profile.py \
               tests/measure/test_compile.py tests/test_public_api.py

test-newest: ## run a quick part of the tests with the newest JAX, on Python 3.13 or 3.12
	@for python in python3.13 python3.12 \
	  $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
	    >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "NOT TESTED with JAX $(NEWEST_JAX): neither Python 3.13 nor 3.12 is here"; exit 0; \
	fi; \
	set -e; mkdir -p $(NEWEST); \
	sed -E 's/^(jax|jaxlib)==.*/\1==$(NEWEST_JAX)/' constraints.txt > $(NEWEST)/constraints.txt; \
	[ -x $(NEWEST)/bin/python ] || $$found -m venv $(NEWEST); \
	echo "JAX $(NEWEST_JAX) on $$($(NEWEST)/bin/python --version)"; \
	$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check \
	  --constraint $(NEWEST)/constraints.txt --editable '.[test,text,parquet,hub,tensorboard,serve]'; \
	$(NEWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" -p no:cacheprovider $(NEWEST_ARGS)

# Other people's clients, in an environment of their own, and the system's Chromium, if it is there.
CLIENTS      := $(VENV)-clients
CLIENTS_ARGS ?=
CLIENTS_PINS := tests/clients/requirements.txt

test-clients: $(VENV)/.installed-test ## run the tests with clients as they are: OpenAI's, lm-eval, a browser ...
	@[ -x $(CLIENTS)/bin/python ] || $(BIN)/python -m venv $(CLIENTS)
	@if ! cmp -s $(CLIENTS_PINS) $(CLIENTS)/installed.txt; then \
	  echo "installing the clients into $(CLIENTS) (the first time takes some minutes)"; \
	  if ! $(CLIENTS)/bin/python -m pip install -qq --disable-pip-version-check -r $(CLIENTS_PINS); then \
	    echo "NOT TESTED with clients: their packages cannot be installed"; exit 0; \
	  fi; \
	  cp $(CLIENTS_PINS) $(CLIENTS)/installed.txt; \
	fi; \
	TVQ=$(BIN)/tvq $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients \
	  --durations=5 $(CLIENTS_ARGS)

docs: $(VENV)/.installed-docs ## build the docs as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the docs are in site/index.html"

lint: $(VENV)/.installed-dev ## check style, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	@! grep -rnE 'default_backend|platform_dependent' src --include='*.py' | grep -v nn/products.py \
	  || { echo "only nn/products.py may ask for the backend" >&2; exit 1; }

format: $(VENV)/.installed-dev ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev ## run the checks at every commit
	$(BIN)/pre-commit install

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(NEWEST) $(CLIENTS) site .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- the environment

$(VENV)/.installed-run:  EXTRAS := [serve]
$(VENV)/.installed-test: EXTRAS := [test,text,parquet,hub,tensorboard,serve]
$(VENV)/.installed-dev:  EXTRAS := [test,text,parquet,hub,tensorboard,serve,dev]
$(VENV)/.installed-docs: EXTRAS := [docs]

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(SUPPORTED)' || { \
	  echo "$(VENV) holds $$($(BIN)/python --version 2>&1), and 3.11 to 3.13 is needed:" \
	    "remove it (rm -rf $(VENV)) and try again" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo "installing transformer-vq$(EXTRAS) into $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
	  --constraint constraints.txt --editable '.$(EXTRAS)'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON); do \
	  if $$python -c '$(SUPPORTED)' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "no usable Python: 3.11, 3.12 or 3.13 with its venv module is needed; tried" \
	  "$(PYTHON) (python3 is $$(python3 --version 2>&1 || echo missing))." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv)," \
	  "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	exit 1
