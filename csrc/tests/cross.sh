#!/usr/bin/env bash
# Run by `make cross`: compiles the kernels for a target in zig's words, such as aarch64-macos. For Linux also their
# tests, but for those on the shim, whose fibers musl lacks; they run if qemu is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1 folder=build/cross/$1
processor=${target%%-*}
case $target in
  *-linux-*) system=Linux ;;
  *-macos*) system=Darwin ;;
  *-windows-*) system=Windows ;;
esac
emulator=$(command -v "qemu-$processor-static" || command -v "qemu-$processor" || true)
export PYTHONPATH=$PWD/build/zig CXX="$(command -v python) -m ziglang c++ -target $target"
mkdir -p "$folder"
{
  cmake -G Ninja -S . -B "$folder" -DCMAKE_SYSTEM_NAME=$system -DCMAKE_SYSTEM_PROCESSOR="$processor" \
    -DCOSFACE_TESTS=ON -DCMAKE_CROSSCOMPILING_EMULATOR="$emulator"
  tests=
  [[ $system == Linux ]] && tests=$(ctest --test-dir "$folder" -N | sed -n 's/.*: \([a-z]*\)_baseline$/test_\1/p')
  cmake --build "$folder" --target cosface_cpu $tests
} >"$folder/log" 2>&1 || { cat "$folder/log" && exit 1; }
if [[ -n $tests && -n $emulator ]]; then
  ctest --test-dir "$folder" -j2 --output-on-failure -R _baseline
else
  echo "$target: compiled, not run."
fi
