# `make demo` and `make test` set up what they need in .venv, without root; a second call rebuilds only what changed.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

CPP := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
NVCC := $(shell PATH="$(CUDA_HOME)/bin:$(PATH)" command -v nvcc)
DEPENDENCIES := .venv/dependencies.stamp
BUILT := .venv/built.stamp

.PHONY: demo test environments gpu-check gpu-rehearse kernels cuda-check build lint docs wheel sanitize asan \
  module-asan tsan native cross bench clean

demo: $(BUILT)
	$(BIN)/python examples/demo/demo.py

# JOBS processes share the tests, each with files of its own, so that most of what a file sets up is set up once; who has
# none left takes from another.
# The second run executes the Triton kernels in Triton's interpreter; it and the compiler cannot share a process.
test: $(BUILT)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -W "ignore::RuntimeWarning"

# The suites in environments of their own, with the oldest versions that are promised and with those of a GPU machine.
environments:
	tests/environments.sh

# On a machine with a GPU: races, the op's tests and sanitizers, then time and memory; figures go to build/gpu.
gpu-check: $(BUILT)
	PYTHON=$(BIN)/python bash bench/gpu.sh prove
	PYTHON=$(BIN)/python bash bench/gpu.sh measure

# The same without a GPU, at toy sizes, so that nothing is left to fail there but what only a GPU does.
gpu-rehearse: $(BUILT)
	PYTHON=$(BIN)/python bash bench/gpu.sh rehearse

# Compiles every Triton kernel ahead of time for sm_80, sm_90, sm_100 and gfx942, with the Triton of the pinned torch; no GPU
# needed. Then with the oldest Triton that is taken, which is torch 2.11's too, for Hopper and Blackwell. `environments`
# does so with the newest. Last, what each tile is predicted to take.
OLDEST_TRITON := 3.6.0
kernels: $(BUILT) build/triton-$(OLDEST_TRITON)
	$(BIN)/python -m bench kernels --dim 512,515,64 --json build/kernels.json
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -m bench kernels --arch sm_90,sm_100 --dim 512,515,64 --json build/kernels-oldest.json
	$(BIN)/python -m bench model build/kernels.json --kernels-too --specialized

build/triton-%: | $(BUILT)
	$(BIN)/pip install -q --no-deps --target $@ triton==$*

# Compiles the CUDA kernels and, for one architecture, a module that has them; no GPU needed, nor a torch that knows one.
cuda-check: $(BUILT)
ifeq ($(NVCC),)
	@echo "cuda-check needs nvcc, which is neither on PATH nor in CUDA_HOME: nothing was checked."
	@test "$(CI)" != true
else
	$(BIN)/python -m bench cuda-kernels --json build/cuda-kernels.json
	rm -rf build/cuda
	COSFACE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/cuda .
	$(BIN)/pip install -q --no-deps --target build/cuda/site build/cuda/*.whl
	PYTHONPATH=build/cuda/site $(BIN)/python -P csrc/tests/check_cuda_build.py
endif

build: $(BUILT)

# That the pinned versions suit each other is asked of PyPI, for a torch that is there already may need less.
lint: $(BUILT)
	$(BIN)/uv --no-config pip compile -q --python-platform x86_64-manylinux_2_28 constraints.txt -o build/resolved.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# The pages of docs/ as a site in build/site. Its environment is its own, since it reads the sources and imports none.
DOCS_VENV := build/docs-venv
docs: $(DOCS_VENV)/complete
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/complete: Makefile
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install -q mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
	touch $@

# The sdist; the wheel that pip makes of it alone, with the newest of what builds it; and in a new environment with that
# wheel, beside no source of the package, the README's quick start and the tests of the operator and of a head. Under each
# of several torches: `make wheel TORCH="2.10.0 2.14.1"`.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
wheel: $(DEPENDENCIES)
	rm -rf build/wheel
	$(BIN)/python setup.py -q sdist -d build/wheel
	mkdir build/wheel/source && tar xzf build/wheel/*.tar.gz -C build/wheel/source --strip-components 1
	COSFACE_TESTS=1 COSFACE_CUDA=0 $(BIN)/pip wheel -q --no-deps -w build/wheel build/wheel/source
	rm -r build/wheel/source/cosface_kernels
	set -e; cd build/wheel; for torch in $(TORCH); do \
	  $(PYTHON) -m venv --clear venv; \
	  venv/bin/pip install -q torch==$$torch *.whl $$(grep -E "^(hypothesis|numpy|pytest|pytest-xdist)=" ../../constraints.txt); \
	  (cd source && ../venv/bin/python -m pytest -q -n $(JOBS) tests/core/test_correctness.py tests/core/test_module.py \
	    tests/core/test_info.py "tests/packaging/test_docs.py::test_the_code_of_a_page_runs[README.md]"); \
	done

# The kernels for systems that are not here, by the clang of zig, which brings what each needs: compiled, not run, but for
# aarch64's tests where qemu runs them.
CROSS := aarch64-linux-musl aarch64-macos x86_64-windows-gnu
cross: $(DEPENDENCIES)
	test -d build/zig || $(BIN)/pip install -q --no-deps --target build/zig ziglang==0.17.1
	for target in $(CROSS); do csrc/tests/cross.sh $$target || exit 1; done

# The kernels and the threaded driver, without Python and torch. A sanitizer keeps the compiler from vectorising, so
# the code as it ships runs too, with its buffers against guard pages.
sanitize: asan module-asan tsan native
asan: SANITIZE = address,undefined
tsan: SANITIZE = thread
asan tsan: FOLDER = build/$@
# Where setup.py builds the module, whose objects the tests then run.
native: FOLDER = build/cmake-$(shell $(BIN)/python -c "import sys; print(sys.implementation.cache_tag)")
native: $(BUILT)

asan tsan native: $(DEPENDENCIES)
	cmake -G Ninja -S . -B $(FOLDER) -DCOSFACE_TESTS=ON -DCOSFACE_SANITIZE=$(SANITIZE)
	cmake --build $(FOLDER)
	ctest --test-dir $(FOLDER) --output-on-failure -j2

# The module as it is built, under AddressSanitizer, called with what does not fit, and with options of any kind; backend
# `reference` calls none of it.
module-asan: export COSFACE_SANITIZE = address,undefined
module-asan: asan
	COSFACE_TESTS=1 $(BIN)/python setup.py -q build --build-lib build/asan/site
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" PYTHONMALLOC=malloc \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -P -m pytest -p no:cacheprovider -n $(JOBS) -k "not reference" \
	  -o "pythonpath=build/asan/site" tests/core/test_contract.py tests/core/test_wanted.py

bench: $(BUILT)
	$(BIN)/python -m bench step --batch 256 --dim 512 --classes 1000000 \
	  --impl fused,eager,compile,checkpoint,pml,torch-lce --json build/bench.json
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-only

clean:
	rm -rf .venv build *.egg-info cosface_kernels/_C*.so

$(DEPENDENCIES): constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('make needs Python 3.11 or newer, for which \
	constraints.txt pins versions, and $(PYTHON) is older: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r constraints.txt
	touch $@

$(BUILT): $(DEPENDENCIES) setup.py pyproject.toml CMakeLists.txt $(CPP)
	COSFACE_TESTS=1 $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
