"""Processes that stay for a whole test run and work together on a function whenever a test asks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from cosface_kernels.distributed import destroy_process_group
from support import patience

LARGEST_WORLD = 4


class Odd:
    """What has a state of one value, whatever it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Ranks:
    """LARGEST_WORLD gloo processes, of which the first k form a group for each k."""

    def __init__(self, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(LARGEST_WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(rank, group, *args) returns on each rank, an exception where it raises one."""
        for connection in self._connections[:world]:
            connection.send_bytes(pickle.dumps((world, function, args)))
        return [pickle.loads(connection.recv_bytes()) for connection in self._connections[:world]]

    def results(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`; raises the first exception."""
        results = self.run(world, function, *args)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=patience(10))
            if process.is_alive():
                process.kill()


def _serve(rank: int, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=patience(60))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, rank=rank, world_size=LARGEST_WORLD)
    _answer(rank, connection, timeout)
    destroy_process_group()


def _answer(rank: int, connection: Connection, timeout: timedelta) -> None:
    groups = {k: dist.new_group(range(k), timeout=timeout) for k in range(1, LARGEST_WORLD + 1)}
    while True:
        try:
            world, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:  # the test run is over
            return
        torch.manual_seed(rank)  # unlike on every rank, as in a program that does not seed
        try:
            result = function(rank, groups[world], *args)
        except Exception as error:
            result = error
        connection.send_bytes(pickle.dumps(result))
