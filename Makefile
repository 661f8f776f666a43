# `make demo` and `make test` set up what they need in .venv, without root; a second call rebuilds only what changed.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')
DEPENDENCIES := .venv/dependencies.stamp
BUILT := .venv/built.stamp

.PHONY: demo test gpu-check kernels build lint wheel sanitize asan tsan native bench clean

demo: $(BUILT)
	$(BIN)/python examples/train.py

# The second run executes the Triton kernels in Triton's interpreter; it and the compiler cannot share a process.
test: $(BUILT)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -W "ignore::RuntimeWarning"

# On a machine with a GPU: the suite of the op on it, then time and memory, kept in bench/results.
gpu-check: $(BUILT)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m bench step --device cuda --dtype bfloat16 --batch 256,1024,4096 --dim 512 --classes 1000000 \
	  --impl fused,eager,compile,checkpoint,torch-lce,cce,liger \
	  --json "bench/results/$$($(BIN)/python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))').json"

# Compiles every Triton kernel ahead of time for sm_80, sm_90, sm_100 and gfx942; no GPU needed.
kernels: $(BUILT)
	$(BIN)/python -m bench kernels --json build/kernels.json

build: $(BUILT)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# A wheel, installed into a folder of its own and run from there.
wheel: $(DEPENDENCIES)
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && PYTHONPATH=site $(CURDIR)/$(BIN)/python -P -m cosface_kernels.info

# The kernels and the threaded driver, without Python and torch. A sanitizer keeps the compiler from vectorising, so
# the code as it ships runs too, with its buffers against guard pages.
sanitize: asan tsan native
asan: CMAKE_OPTIONS = -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCOSFACE_SANITIZE=address,undefined
tsan: CMAKE_OPTIONS = -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCOSFACE_SANITIZE=thread
native: CMAKE_OPTIONS = -DCMAKE_BUILD_TYPE=Release

asan tsan native: $(DEPENDENCIES)
	cmake -G Ninja -S . -B build/$@ -DCOSFACE_TESTS=ON $(CMAKE_OPTIONS)
	cmake --build build/$@
	ctest --test-dir build/$@ --output-on-failure -j2

bench: $(BUILT)
	$(BIN)/python -m bench step --batch 256 --dim 512 --classes 1000000 \
	  --impl fused,eager,compile,checkpoint,pml,torch-lce --json build/bench.json
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-only

clean:
	rm -rf .venv build *.egg-info cosface_kernels/_C*.so

$(DEPENDENCIES): constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r constraints.txt
	touch $@

$(BUILT): $(DEPENDENCIES) setup.py pyproject.toml CMakeLists.txt $(CPP)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
