# make install      the environment in .venv (needs git, make, Python 3.11 or newer; no GPU)
# make install-gpu  besides, on a GPU host with the CUDA toolkit: TransformerEngine, built against the installed torch
# make quickstart   the whole loop on this machine: data, a tiny model, cold start, reinforcement learning
# make quickstart-agent  the same task, played by an agent of OpenAI's SDK through the endpoint (docs/agents.md)
# make example      the same with a real language model, SmolLM2-135M-Instruct: at most an hour on two cores
# make chaos        a run whose processes are killed and stopped one after the other, and what came of it: 25 minutes
# make test         all tests but those of test-long; make test-fast   those of tests/unit, at a glance
# make test-long    publications, runs and jobs under one fault after the other, all layouts of four ranks: half a minute of CPU or more each; CI runs both
# make test-harnesses  agents' harnesses of other people, unchanged, in an environment of their own (.venv-harnesses)
# make test-verifiers  environments of the package verifiers, with its 96 packages in .venv-verifiers (600 MB)
# make test-sinks   Weights & Biases and MLflow as published, in .venv-sinks (400 MB)
# make docs         docs/ as a site in site/, to be read from the disk; Sphinx in .venv-docs (120 MB)
# make lint         style, format and types, in seconds; CI runs it first
# make clean        remove the environments and caches; runs/ stays

VENV := .venv
STAMP := $(VENV)/.installed
GPU_STAMP := $(VENV)/.installed-gpu
HARNESSES := .venv-harnesses
VERIFIERS := .venv-verifiers
SINKS := .venv-sinks
DOCS := .venv-docs
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: install install-gpu quickstart quickstart-agent example chaos test test-long test-fast test-harnesses test-verifiers test-sinks docs lint clean

install: $(STAMP)

$(STAMP): requirements.lock setup.py tools/install.sh
	sh tools/install.sh $(VENV)
	@touch $@

install-gpu: $(GPU_STAMP)

$(GPU_STAMP): $(STAMP) requirements-gpu.lock
	sh tools/install.sh --gpu $(VENV)
	@touch $@

quickstart: install
	$(VENV)/bin/python tools/quickstart.py

quickstart-agent: install
	$(VENV)/bin/python tools/quickstart_agent.py

example: install
	$(VENV)/bin/python tools/example.py

chaos: install
	$(VENV)/bin/python tools/chaos.py

test: install
	$(PYTEST) -n 3 -m "not long"

test-long: install
	$(PYTEST) -n 3 -m long tests/integration tests/dist

test-fast: install
	$(PYTEST) -n 2 -m "not thorough" --hypothesis-profile=glance tests/unit

test-harnesses: install $(HARNESSES)/.installed
	$(VENV)/bin/python -m pytest tests/harnesses

$(HARNESSES)/.installed: tests/harnesses/requirements.txt | $(STAMP)
	$(VENV)/bin/python -m venv --clear $(HARNESSES)
	$(HARNESSES)/bin/python -m pip install --quiet --no-deps --requirement tests/harnesses/requirements.txt
	$(HARNESSES)/bin/python -m pip check
	@touch $@

test-verifiers: install $(VERIFIERS)/.installed
	$(VENV)/bin/python -m pytest tests/published/test_verifiers.py

$(VERIFIERS)/.installed: tests/published/verifiers.lock | $(STAMP)
	$(VENV)/bin/python -m venv --clear $(VERIFIERS)
	$(VERIFIERS)/bin/python -m pip install --quiet --requirement tests/published/verifiers.lock
	@touch $@

test-sinks: install $(SINKS)/.installed
	$(VENV)/bin/python -m pytest tests/published/test_sinks.py

$(SINKS)/.installed: tests/published/sinks.lock | $(STAMP)
	$(VENV)/bin/python -m venv --clear $(SINKS)
	$(SINKS)/bin/python -m pip install --quiet --requirement tests/published/sinks.lock
	@touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -c docs/site -d $(DOCS)/read . site
	@echo "docs: site/index.html"

$(DOCS)/.installed: docs/site/requirements.lock
	$${PYTHON:-python3} -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --requirement docs/site/requirements.lock
	$(DOCS)/bin/python -m pip check
	@touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(HARNESSES) $(VERIFIERS) $(SINKS) $(DOCS) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -type d -prune -exec rm -rf {} +
