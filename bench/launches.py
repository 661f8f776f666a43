"""Launches of the Triton kernels as `bench gpu` sees them: each through a hook, each with a tile of choice."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.implementations import UnavailableError
from cosface_kernels.backends import triton
from cosface_kernels.backends.triton import choice, launch
from cosface_kernels.backends.triton import tiles as block_sizes
from cosface_kernels.backends.triton.tiles import Key, Tile

# By the kernel's name, what launches it, and its arguments.
Hook = Callable[[str, Callable[[], None], tuple[Any, ...]], None]


def tiles(kernel: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The table's entries on this machine, for x and w of this dtype."""
    if reason := triton.unavailable():
        raise UnavailableError(f"The kernels cannot run: {reason}")
    return block_sizes.table(kernel, _key(dtype, dim=16))


def specialized(kernel: str, dtype: torch.dtype, dim: int) -> tuple[Tile, ...]:
    """Of the kernels that are off by default."""
    return block_sizes.specialized(kernel, _key(dtype, dim))


def _key(dtype: torch.dtype, dim: int) -> Key:
    architecture = launch.architecture(torch.device("cuda"))
    return Key(architecture, dim, dtype, dtype, dtype, bucket=0, described=True)


def name(tile: Tile) -> str:
    return f"{tile.n}x{tile.c}x{tile.d} w{tile.warps} s{tile.stages}"


@contextmanager
def pinned(kernel: str, tile: Tile) -> Iterator[None]:
    """The kernel has this tile and no other; the others have their defaults (with COSFACE_TRITON_TUNE=0)."""
    choose = choice.choose
    choice.choose = lambda name, *key: tile if name == kernel else choose(name, *key)
    try:
        yield
    finally:
        choice.choose = choose


@contextmanager
def through(hook: Hook) -> Iterator[None]:
    """Launches call the hook, which launches or does not."""
    triton.unavailable()  # which imports them
    kernels, hopper = launch.kernels, launch.hopper
    launch.kernels, launch.hopper = _Kernels(kernels, hook), lambda: _Specialized(hopper(), hook)
    try:
        yield
    finally:
        launch.kernels, launch.hopper = kernels, hopper


class _Kernels:
    def __init__(self, kernels: Any, hook: Hook) -> None:
        self.kernels, self.hook = kernels, hook

    def __getattr__(self, name: str) -> "_Kernel":
        return _Kernel(name, getattr(self.kernels, name), self.hook)


class _Specialized(_Kernels):
    """In whose module there is more than kernels."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in block_sizes.SPECIALIZED else getattr(self.kernels, name)


class _Kernel:
    def __init__(self, name: str, kernel: Any, hook: Hook) -> None:
        self.name, self.kernel, self.hook = name, kernel, hook

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.hook(self.name, functools.partial(self.kernel[grid], *arguments, **options), arguments)

        return launch
