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
configure = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(2) > build-$(1).log || (cat build-$(1).log; false)
define build_and_test
@rm -f build-$(1).log
$(BIN)/cmake --build build/$(1) -j $(JOBS)
$(BIN)/ctest --test-dir build/$(1) --output-on-failure -j $(JOBS)
endef

NATIVE := $(shell find csrc -type f) setup.py pyproject.toml version.txt

.PHONY: demo test test-cpp asan tsan fuzz arm-check cuda-check bench lint clean

demo: $(VENV)/.built-demo
	$(BIN)/dynplan demo --output dynplan-demo

test: $(VENV)/.built-test test-cpp
	$(BIN)/python -m pytest

test-cpp: $(VENV)/.built-test
	$(call configure,cmake)
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

lint: $(VENV)/.built-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

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
