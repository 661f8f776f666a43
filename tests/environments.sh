#!/usr/bin/env bash
# The CPU suite, the interpreted suite and the ahead-of-time compilation in each environment below, a row of a
# table for each: `tests/environments.sh [NAME...]`. Environments are kept in the user's cache, as are the logs.
set -euo pipefail
cd "$(dirname "$0")/.."

# name, Python, which versions of what pyproject.toml asks for, torch, triton, numpy, the numpy of the interpreted suite
# (conftest.py says why it is another), and whether the CUDA kernels are built: nvcc must suit the CUDA of that torch.
environments="
oldest 3.10 lowest-direct 2.10.0 3.6.0 1.26.0 1.26.0 0
gpu    3.12 highest       2.11.0 3.6.0 2.5.2  2.3.5  1
newest 3.14 highest       2.15.0 3.9.0 2.5.5  2.5.5  1
"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/cosface_kernels/environments
export COSFACE_TESTS=1 COSFACE_TEST_PATIENCE=${COSFACE_TEST_PATIENCE:-3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
build_tools=$(sed -n 's/^requires = \[\(.*\)\]$/\1/p' pyproject.toml | tr -d '",')

# install HOME PYTHON VERSIONS TORCH TRITON NUMPY OTHER_NUMPY: once; HOME/complete says that it is done.
install() {
  test -e "$1/complete" && return
  rm -rf "$1"
  "python$2" -m venv "$1/venv"
  "$1/venv/bin/pip" install -q uv
  local uv=("$1/venv/bin/uv" pip install -q --python "$1/venv/bin/python")
  "${uv[@]}" --resolution "$3" -r pyproject.toml --extra test "torch==$4" "triton==$5" "numpy==$6" $build_tools
  "${uv[@]}" pytest-timeout
  "${uv[@]}" --no-deps --target "$1/numpy" "numpy==$7"
  touch "$1/complete"
}

# logged FILE COMMAND...: the last line that the command prints; whatever its status, the next one runs.
logged() {
  "${@:2}" >"$1" 2>&1 || true
  tail -n 1 "$1" | sed 's/^=* *//; s/ *=*$//'
}

# check HOME: in a copy of the tree, so that no environment's module or build is another's.
check() {
  local python=$1/venv/bin/python
  export PATH="$1/venv/bin:$PATH"
  mkdir -p "$1/build" "$1/logs"
  rm -rf "$1/source" && mkdir "$1/source" && ln -s ../build "$1/source/build"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp -p --parents -t "$1/source"
  cd "$1/source"
  if ! "$python" setup.py -q build_ext --inplace >"$1/logs/build" 2>&1; then
    echo " does not build: $1/logs/build |"
    return
  fi
  echo -n " $(logged "$1/logs/suite" "$python" -m pytest -q -n "${JOBS:-2}") |"
  echo -n " $(PYTHONPATH=$1/numpy TRITON_INTERPRET=1 logged "$1/logs/interpreted" \
    "$python" -m pytest -q -n "${JOBS:-2}" -W "ignore::RuntimeWarning") |"
  echo " $(logged "$1/logs/kernels" "$python" -m bench kernels --dim 512,515,64) |"
}

echo "| Python | torch | triton | numpy (interpreted) | CPU suite | interpreted suite | kernels |"
echo "|---|---|---|---|---|---|---|"
while read -r name python versions torch triton numpy other_numpy COSFACE_CUDA; do
  export COSFACE_CUDA
  [[ -z $name || ($# -gt 0 && " $* " != *" $name "*) ]] && continue
  echo -n "| $python | $torch | $triton | $numpy ($other_numpy) |"
  if ! command -v "python$python" >/dev/null; then
    echo " python$python is not on PATH |"
    continue
  fi
  install "$cache/$name" "$python" "$versions" "$torch" "$triton" "$numpy" "$other_numpy" </dev/null
  (check "$cache/$name" </dev/null)
done <<<"$environments"
