# The developer's commands. Each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
# pip compiles every file of every package, two thirds of which nobody imports; the first import keeps what it compiled.
PIP := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
BUILD := MAKEFLAGS= $(BIN)/python setup.py
NATIVE := $(BUILD) -q build_ext --inplace --strict
# Threads that wait sleep: two processes of more threads than processors would take each other's time by spinning.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(abspath $(BIN))/python -m pytest -n 2 --dist worksteal

.PHONY: demo test bench native modules modules-native modules-sanitized modules-emulated check test-interpreted \
    test-sanitize test-emulated test-neon gpu-check format clean

demo: $(READY)  ## train on real scans, draw and answer: demo-out/
	$(BIN)/omnimamba demo --out demo-out

test: $(TOOLS)  ## style, all tests, and the kernels once more under sanitizers
	$(MAKE) -j3 $(READY) modules check  # what waits for packages or for one last file leaves no processor idle
	$(PYTEST) tests
	@command -v valgrind > /dev/null || \
	    echo "NOT RUN: the counts of instructions (tests/test_bench_instructions.py): valgrind is not installed"
	@$(BIN)/python tests/model/browser.py > /dev/null || \
	    echo "NOT RUN: the page in a browser (tests/model/test_web.py): Chromium is not installed"
	$(MAKE) -j2 test-interpreted test-sanitize  # where one starts, ends or waits for a long test, the other goes on

# The Triton kernels on the CPU, in Triton's interpreter; where Triton does not exist there is nothing to do.
test-interpreted: $(READY)
	! $(BIN)/python -c "import triton" 2> /dev/null || \
	    TRITON_INTERPRET=1 $(PYTEST) -q tests/kernels -k triton

# On a machine with a GPU, with the Python, torch and Triton that are there: nothing is installed or fetched.
OUT ?= gpu-check-out
gpu-check:  ## all kernel tests on the GPU, then every operation against its peers: OUT/report.md
	started=$$(date +%s) && $(PYTHON) setup.py -q build_ext --inplace && \
	    $(PYTHON) -m bench.gpu_check --out $(OUT) --started $$started

# Without llama-cpp-python, an extra that is built from source (README), llama.cpp's rows are left out and the
# three promises about it are not judged.
bench: $(VENV)/.peers  ## every table of the README
	$(NATIVE)
	$(BIN)/python -m pytest bench

native: $(READY)  ## incremental build of the native modules into omnimamba_kernels/
	@$(NATIVE)

# Every module that the tests load: of the kernels, of the CUDA kernels on the emulator, and with sanitizers.
modules: modules-native modules-sanitized modules-emulated

modules-native: $(TOOLS)
	$(NATIVE)

modules-sanitized: $(TOOLS)
	$(SANITIZE)

modules-emulated: $(TOOLS)
	$(BUILD) -q build_emulator

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

# A copy of the packages and tests with modules that stop at the first bad read, write or undefined operation.
# Only what runs compiled kernels is repeated.
SANITIZED := build/sanitized
SANITIZE := $(BUILD) -q build_py --build-lib $(SANITIZED) \
    build_ext --build-lib $(SANITIZED) --strict --sanitize=address,undefined
test-sanitize: $(READY)
	rm -rf $(SANITIZED)
	$(SANITIZE)
	cp -rp tests pyproject.toml $(SANITIZED)/
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(PYTEST) -q --capture=sys -p no:cacheprovider -k "native and not compile" tests/kernels

# The CUDA kernels on the emulator once more, with modules that stop at the first byte out of bounds.
test-emulated: $(READY)
	$(BUILD) -q build_emulator --sanitize=address
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	    $(PYTEST) -q --capture=sys -p no:cacheprovider tests/kernels tests/test_emulator.py \
	    -k "(cuda-emulated and (matches_the_definition or (matches_the_recurrence and (short or packed)))) or sanitizer"

# The native kernels as an ARM processor runs them, in qemu: Debian's g++-aarch64-linux-gnu and qemu-user.
test-neon: $(READY)
	PYTHONPATH=tests/neon $(BIN)/python -m pytest -p neon -q -p no:cacheprovider tests/kernels -k native-neon

$(VENV):
	$(PYTHON) -m venv $(VENV)

# What compiles the kernels; the rest of the environment can come meanwhile.
$(TOOLS): pyproject.toml constraints.txt | $(VENV)
	$(PIP) setuptools wheel cmake ninja pybind11
	touch $@

$(READY): $(TOOLS)
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

# What the benchmarks compare with.
$(VENV)/.peers: $(READY)
	$(PIP) --no-build-isolation -e '.[bench]'
	touch $@

clean:
	rm -rf build demo-out *.egg-info omnimamba_kernels/_native_*.so omnimamba_kernels/_build_info.py
