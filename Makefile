# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv, builds and runs.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml version.txt

.PHONY: demo test test-cpp cuda-check bench lint docs coverage clean

demo: $(VENV)/.built-demo
	$(BIN)/dynplan demo --output dynplan-demo

test: $(VENV)/.built-test test-cpp
	$(BIN)/python -m pytest

test-cpp: $(VENV)/.built-test
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja > build-cmake.log || (cat build-cmake.log; false)
	@rm -f build-cmake.log
	$(BIN)/cmake --build build/cmake -j $(JOBS)
	$(BIN)/ctest --test-dir build/cmake --output-on-failure -j $(JOBS)

cuda-check: $(VENV)/.torch
	PYTHON=$(BIN)/python JOBS=$(JOBS) bash scripts/cuda_check.sh

bench: $(VENV)/.built-test
	$(BIN)/dynplan bench

lint: $(VENV)/.built-test docs
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/codespell

# The site, in build/site; a warning is an error.
docs: $(VENV)/.built-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Which lines and branches of the Python code the tests reach. A test run apart: tracing slows it.
coverage: $(VENV)/.built-test
	$(BIN)/python -m pytest --cov --cov-report=term

clean:
	rm -rf build dynplan/*.so dynplan/_build_info.json $(VENV)

# torch first and by itself: the extension is compiled against the torch that will load it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77" wheel ninja "pybind11>=3.0" numpy
	@touch $@

$(VENV)/.built-%: $(VENV)/.torch $(NATIVE)
	MAX_JOBS=$(JOBS) $(PIP) install --no-build-isolation -e ".[$*]"
	@touch $@
