# `make demo` and `make test`: each makes the virtual environment .venv, installs minrnn there with the
# versions of constraints.txt, and does its work. What is installed already is not installed again.
#
#   make demo PYTHON=python3.12     with another interpreter
#   make test ARGS="-k scan -x"     with arguments for pytest
#   make test VENV=/tmp/venv        in another environment
#   make docs                       the documentation's site, in build/docs
#   make sanitize                   the compiled engine's tests, under AddressSanitizer and UBSan
#   make mutants                    which planted faults the tests notice; ARGS="--room ops": those of a package

PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BUILD_TOOLS := scikit-build-core nanobind cmake ninja

# Where the compiled engine is led to every end of its arrays. Of its comparison with the reference, cell by cell and
# size by size, a part: under the sanitizers all of it would take half an hour.
ENGINE_TESTS := $(addprefix tests/test_,infinities.py border.py selective_scan.py decoder.py) \
  $(addprefix tests/test_scan.py::test_,engine_partitions chunks_of_time chunks_never_forget_what_is_not_finite \
  layouts restart extremes nan_propagates_from_its_step_on half_conversions_are_torchs)
NOT_SANITIZED := where_there_is_no_memory or instruction_set or compile or export or opcheck or gradcheck

.PHONY: demo test slow mutants docs sanitize lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/minrnn demo $(ARGS)

# One thread for each of two test processes: with more, they would wait for each other. A test that takes its process
# beyond 2 GiB fails; on a GPU's machine, where CUDA alone holds as much, MINRNN_PEAK=0 does without.
test: export MINRNN_PEAK ?= 2048
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS)

# What takes minutes: kills, pairs of processes, mutants of every file that is read.
slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS) tests/slow

# Faults are planted in copies of the checkout, one at a time: tests/mutants. Those of csrc are compiled there.
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants/run.py $(ARGS)

# Every code cell of the pages runs, and a warning is an error. Nothing is kept from an earlier build but its pages.
docs: $(VENV)/.documented
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet --doctree-dir build/doctrees $(ARGS) \
	  docs build/docs
	@echo "the site's first page is build/docs/index.html"

$(VENV)/.documented: $(VENV)/.installed
	@$(PIP) --no-build-isolation --config-settings=build-dir=$(abspath $(VENV))/build --editable '.[docs]'
	@touch $@

# The extension is built anew, with checks, into an environment of its own, which borrows all else from $(VENV). The
# sanitizer's library has to be loaded first, and the C++ library with it, so that it finds what it replaces there;
# what Python and torch never free is no finding. Where a check fails, the process ends. It needs more addresses than
# one test leaves a process, has one instruction set alone, and finds nothing in torch's compiler.
sanitize: $(VENV)/.sanitized
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  $(VENV)/sanitize/bin/python -m pytest --numprocesses 0 $(ENGINE_TESTS) \
	  -k "not ($(NOT_SANITIZED))" $(ARGS)

$(VENV)/.sanitized: $(VENV)/.installed $(shell find src -name '*.py')
	@$(BIN)/python -m venv --without-pip $(VENV)/sanitize
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(VENV)/sanitize/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	@$(VENV)/sanitize/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --ignore-installed --config-settings=build-dir=$(abspath $(VENV))/sanitize/build \
	  --config-settings=cmake.define.MINRNN_SANITIZE=ON --config-settings=install.strip=false .
	@touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build

# Editable: Python files are used where they lie, so an edit needs no installation; what is compiled does.
# Built without isolation, with the tools that the constraints pin, into a folder that keeps what is unchanged.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "installing minrnn and what it needs into $(VENV)"
	@$(PIP) $(BUILD_TOOLS)
	@$(PIP) --no-build-isolation --config-settings=build-dir=$(abspath $(VENV))/build --editable '.[dev]'
	@$(BIN)/minrnn engines
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minrnn needs Python 3.11 or newer, and '$(PYTHON)' is not one; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
