#!/usr/bin/env bash
# Builds, proves and measures the kernels on a GPU, without a network and with the Python that is there:
#
#   bash bench/gpu.sh prove      at most 9 minutes: races, tests, sanitizers
#   bash bench/gpu.sh measure    at most 9 minutes: kernels by tile, steps, peers, a profile
#   bash bench/gpu.sh sweep      at most 5 minutes: chunks, stages, warps, larger tiles
#   bash bench/gpu.sh rehearse   all of them without a GPU, at toy sizes; fails on any exception
#
# PYTHON: which (python3). OUT: where PHASE.jsonl, PHASE.log, junit.xml and peers.json go (build/gpu). wheels/: peers
# that are not installed. Every step has a time limit, and the next one runs anyway; the exit status counts them all.
set -uo pipefail
cd "$(dirname "$0")/.."

# What it starts ends with it. `timeout` gives each program a process group of its own, so that they share a session.
if [ -z "${COSFACE_GPU_SESSION:-}" ]; then
  (
    trap - INT # which is ignored behind `&`, and ends pytest
    COSFACE_GPU_SESSION=1 exec setsid bash bench/gpu.sh "$@"
  ) &
  trap 'pkill -s "$!"' INT TERM HUP
  wait "$!"
  exit
fi

python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-build/gpu}")
work=$PWD/build/gpu-work
toy=() device=cuda under_sanitizer=(compute-sanitizer --error-exitcode 9 --tool)
under_profiler=(ncu --clock-control none --profile-from-start off --section SpeedOfLight --section LaunchStats
  --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats)
problem=(--dtype bfloat16 --batch 1024,256,4096 --dim 512 --classes 1000000 --rounds 3
  --impl fused,fused-cuda,eager,compile,checkpoint,pml,torch-lce,cce,liger)
sanitizers=(memcheck racecheck) dtypes=(bfloat16 tf32 float16 float32)
first_tests=(gpu determinism correctness autograd triton layouts update options compile properties)
failed=()

prepare() {
  mkdir -p "$out" "$work/wheels"
  for wheel in wheels/*.whl; do
    [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$work/wheels"
  done
  PATH=$("$python" -c "import sys; print(sys.prefix)")/bin:$PATH # its cmake and ninja
  export PYTHONPATH=$PWD:$work/wheels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COSFACE_TRITON_TUNE=0
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
  export PYTHONWARNINGS=ignore::RuntimeWarning # of numpy, under the interpreter
  [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null || [ ! -x /usr/local/cuda/bin/nvcc ] ||
    export CUDA_HOME=/usr/local/cuda
}

# LIMIT: it, or what is left of the phase; a second at least, since a `timeout` of 0 has no end.
within() {
  local left=$((deadline - SECONDS))
  ((left < $1)) || left=$1
  echo $((left > 1 ? left : 1))
}

# LIMIT NAME COMMAND...: runs it, within the limit.
step() {
  local limit=$1 name=$2 start=$SECONDS code=0
  shift 2
  timeout -k 10 "$(within "$limit")" "$@" </dev/null || code=$?
  echo "== $name: $((SECONDS - start)) s, exit status $code"
  note "$name" "$code"
}

note() { [ "$2" = 0 ] || failed+=("$1 ($2)"); }

bench_gpu() { # LIMIT STEP... [OPTION...]
  local limit=$1
  shift
  step "$limit" "$*" "$python" -m bench gpu "$@" "${toy[@]}" --file "$out/$phase.jsonl"
}

report() { # [OPTION...]
  deadline=$((SECONDS + 20))
  step 20 report "$python" -m bench.tables "$out/$phase.jsonl" "$@"
}

# The extension for this GPU, whatever TORCH_CUDA_ARCH_LIST there is; if nvcc fails, without CUDA, since the tests need
# the rest of it.
build() {
  local here
  here=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)
  export COSFACE_TESTS=1 TORCH_CUDA_ARCH_LIST=${here:-9.0}
  timeout 240 "$python" setup.py -q build_ext --inplace && return
  COSFACE_CUDA=0 timeout 120 "$python" setup.py -q build_ext --inplace
  return 1
}

start_build() {
  build >"$work/build.txt" 2>&1 &
  building=$!
}

await_build() {
  local code=0
  wait "$building" || code=$?
  ((code == 0)) || tail -n 60 "$work/build.txt"
  echo "== build: exit status $code"
  note build "$code"
}

# LIMIT TOOL: one small step per backend, side by side; `await_tool` prints what it said.
start_tool() {
  local limit=$1 tool=$2 backend
  for backend in triton cuda; do
    [ -n "${toy[*]}" ] && backend=triton
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$(within "$limit")" "${under_sanitizer[@]}" "$tool" \
      "$python" -m bench gpu once --small --backend "$backend" "${toy[@]}" --file "$out/$phase.jsonl" \
      >"$work/$tool-$backend.txt" 2>&1 </dev/null &
    tools+=("$! $tool-$backend")
    [ -z "${toy[*]}" ] || break
  done
}

await_tools() {
  local pid name code
  for tool in "${tools[@]}"; do
    read -r pid name <<<"$tool"
    code=0
    wait "$pid" || code=$?
    tail -n 25 "$work/$name.txt" | cut -c1-150
    echo "== $name: exit status $code"
    note "$name" "$code"
  done
}

races() {
  local pids=() dtype pid code
  for dtype in "${dtypes[@]}"; do # side by side: nearly all of it is compiling
    timeout -k 10 "$(within 170)" "$python" -m bench gpu race --dtype "$dtype" "${toy[@]}" \
      --file "$out/$phase.jsonl" </dev/null &
    pids+=("$! $dtype")
  done
  for pid in "${pids[@]}"; do
    code=0
    wait "${pid% *}" || code=$?
    echo "== race, ${pid#* }: exit status $code"
    note "race, ${pid#* }" "$code"
  done
}

tests() { # the most telling first
  local start=$SECONDS code=0 options files name method=signal
  # No signal reaches Python while it waits for a kernel. So a thread ends the process of a test that hangs, which xdist
  # names and replaces; without xdist it would end all tests, and the stack of the one that hangs is all there is.
  options=(-o faulthandler_timeout=70)
  "$python" -c 'import xdist' 2>/dev/null && options+=(-n "$processes" --maxschedchunk 4) method=thread
  "$python" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout=60 --timeout-method=$method)
  files=$({
    for name in "${first_tests[@]}"; do ls tests/*/"test_$name.py"; done
    grep -lE 'backend' tests/*/test_*.py
  } | awk '!seen[$0]++')
  [ -z "${toy[*]}" ] || files=tests/gpu/test_gpu.py
  # The interrupt is for the first process alone, which then ends its workers, in 20 s, and writes the junit file.
  # shellcheck disable=SC2086
  COSFACE_HYPOTHESIS=gpu timeout --foreground -s INT -k 30 "$(within "$1")" "$python" -m pytest -m gpu -q -rN \
    --tb=short -p no:cacheprovider --junitxml="$out/junit.xml" "${options[@]}" $files </dev/null || code=$?
  echo "== tests: $((SECONDS - start)) s, exit status $code"
  note tests "$code"
}

prove() {
  deadline=$((SECONDS + 500)) tools=()
  start_build
  bench_gpu 90 versions ceilings
  races
  await_build
  if command -v "${under_sanitizer[0]}" >/dev/null; then
    for tool in "${sanitizers[@]}"; do start_tool 200 "$tool"; done
  else
    echo "${under_sanitizer[0]} is not installed: no sanitizer ran."
  fi
  tests $(($(within 310) - 40))
  await_tools
  report --junit "$out/junit.xml"
}

measure() {
  deadline=$((SECONDS + 500))
  start_build
  bench_gpu 160 versions kernels
  bench_gpu 50 library
  await_build
  bench_gpu 90 steps
  bench_gpu 60 update
  bench_gpu 60 tolerance
  bench_gpu 50 specialized # where a barrier is wrong, it ends at its limit
  if command -v "${under_profiler[0]}" >/dev/null; then
    step 70 profile "${under_profiler[@]}" "$python" -m bench gpu once "${toy[@]}" --file "$out/$phase.jsonl" \
      >"$work/profile.txt" 2>&1
    cat "$work/profile.txt"
  else
    echo "${under_profiler[0]} is not installed: nothing was profiled."
  fi
  step 400 peers "$python" -m bench step --device "$device" "${problem[@]}" --json "$out/peers.json"
  report --peers "$out/peers.json"
  grep -sE '^  [a-z_]+ \(|Duration|Throughput|Registers Per|Achieved Occ|Hit Rate' "$work/profile.txt" |
    sed -E 's/ +/ /g' | cut -c1-70 | head -n 45
}

sweep() {
  deadline=$((SECONDS + 260))
  bench_gpu 260 versions sweep
  report
}

run_phase() {
  phase=$1 failed=()
  rm -f "$out/$phase.jsonl"
  "$phase"
  ((${#failed[@]} == 0)) && echo "$phase: every step passed; figures are in $out" && return
  echo "$phase: failed: ${failed[*]}; figures are in $out"
  return 1
}

rehearse() {
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  toy=(--toy) device=cpu under_sanitizer=(env -u) under_profiler=(env) processes=2
  problem=(--batch 8 --dim 16 --classes 300 --rounds 1 --threads 1 --impl fused)
  sanitizers=(memcheck) dtypes=(tf32 float16)
  out=$out/rehearsal
  mkdir -p "$out"
  local code=0
  for name in prove measure sweep; do
    run_phase "$name" || code=1
  done
  return $code
}

processes=8
prepare
case ${1:-} in
  prove | measure | sweep) { run_phase "$1"; } 2>&1 | tee "$out/$1.log" ;;
  rehearse) rehearse ;;
  *)
    echo "usage: bash bench/gpu.sh prove | measure | sweep | rehearse" >&2
    exit 2
    ;;
esac
