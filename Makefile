# make install      the environment in .venv (needs git, make, Python 3.11 or newer; no GPU)
# make install-gpu  besides, on a GPU host with the CUDA toolkit: TransformerEngine, built against the installed torch
# make quickstart   the whole loop on this machine: data, a tiny model, cold start, reinforcement learning
# make quickstart-agent  the same task, played by an agent of OpenAI's SDK through the endpoint (docs/agents.md)
# make example      the same with a real language model, SmolLM2-135M-Instruct: at most an hour on two cores
# make chaos        a run whose processes are killed and stopped one after the other, and what came of it: 25 minutes
# make test         all tests          make test-fast   those of tests/unit
# make test-verifiers  an environment of the package verifiers, with its 96 packages in .venv-verifiers (600 MB)
# make lint         style, format and types, in seconds; CI runs it first
# make clean        remove both environments and caches; runs/ stays

VENV := .venv
STAMP := $(VENV)/.installed
GPU_STAMP := $(VENV)/.installed-gpu
VERIFIERS := .venv-verifiers
VERIFIERS_STAMP := $(VERIFIERS)/.installed
PYTEST := $(VENV)/bin/python -m pytest -n 2

.PHONY: install install-gpu quickstart quickstart-agent example chaos test test-fast test-verifiers lint clean

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
	$(PYTEST)

test-fast: install
	$(PYTEST) tests/unit

test-verifiers: install $(VERIFIERS_STAMP)
	$(VENV)/bin/python -m pytest tests/published/test_verifiers.py

$(VERIFIERS_STAMP): tests/published/verifiers.lock
	$(VENV)/bin/python -m venv $(VERIFIERS)
	$(VERIFIERS)/bin/pip install -q -r tests/published/verifiers.lock
	@touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VERIFIERS) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -type d -prune -exec rm -rf {} +
