#!/usr/bin/env bash
# Run by `make cross`: compiles the kernels for a target in zig's words, such as aarch64-macos. For Linux also their
# tests, which run if qemu is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1 folder=build/cross/$1
processor=${target%%-*}
case $target in
  *-linux-*) system=Linux goal=all ;;
  *-macos*) system=Darwin goal=cosface_cpu ;;
  *-windows-*) system=Windows goal=cosface_cpu ;;
esac
emulator=$(command -v "qemu-$processor-static" || command -v "qemu-$processor" || true)
mkdir -p build/cross
export PYTHONPATH=$PWD/build/zig CXX="$(command -v python) -m ziglang c++ -target $target"
cmake -G Ninja -S . -B "$folder" -DCMAKE_SYSTEM_NAME=$system -DCMAKE_SYSTEM_PROCESSOR="$processor" \
  -DCOSFACE_TESTS=ON -DCMAKE_CROSSCOMPILING_EMULATOR="$emulator" >"$folder.log"
cmake --build "$folder" --target $goal >>"$folder.log" || { cat "$folder.log" && exit 1; }
if [[ $goal != all ]]; then
  echo "$target: compiled, not run."
elif [[ -z $emulator ]]; then
  echo "$target: compiled with its tests, not run: there is no qemu-$processor."
else
  ctest --test-dir "$folder" -j2 --output-on-failure
fi
