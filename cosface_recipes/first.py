"""Work that the first process does alone while the others wait for it, however long it takes."""

import itertools
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cosface_kernels.collectives import agreement, naming

T = TypeVar("T")

WORK = "what the first process does alone"
SIGN_EVERY = 10.0  # seconds, of the first process that it is alive


def first(work: Callable[[], T], device: torch.device) -> T | None:
    """What the work returns, on the first process; all raise, with its sentence, where it fails.

    No collective waits meanwhile, whose time is limited. The others end if the first gives no sign of life for as
    long as the process group waits for any of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    world, store = dist.distributed_c10d._get_default_group(), dist.distributed_c10d._get_default_store()
    is_first, result = dist.get_rank() == 0, None
    # Drawn, because the store may hold the signs of an earlier start, and each agent of torchrun counts its own.
    token = [secrets.token_hex(8)]
    with naming(f"beginning {WORK}", world):
        dist.broadcast_object_list(token, src=0, device=device)
    turn = f"cosface/first/{token[0]}"
    if not is_first:
        with naming(f"waiting for {WORK}", world):
            for sign in itertools.count():
                if store.get(f"{turn}/{sign}") == b"done":  # waits for it
                    break
    with agreement(world, device, WORK):
        if is_first:
            with _signs_of_life(store, turn):
                result = work()
    return result


@contextmanager
def _signs_of_life(store: Any, turn: str) -> Iterator[None]:
    """Every SIGN_EVERY seconds one, from a thread, and behind the body the last."""
    over = threading.Event()

    def give() -> None:
        for sign in itertools.count():
            done = over.wait(SIGN_EVERY)
            store.set(f"{turn}/{sign}", "done" if done else "alive")
            if done:
                return

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
