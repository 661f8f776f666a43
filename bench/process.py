"""A job in a process of its own, which works a turn when asked and otherwise sleeps.

Only one turn runs at a time, so that jobs do not disturb each other; a job that dies takes nothing with it.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from bench import machine
from bench.implementations import UnavailableError

OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # torch raises a RuntimeError


class Job(Protocol):
    def turn(self) -> Any: ...


class FailedError(RuntimeError):
    """A job raised what it should not have, or its process ended; the message says what happened."""


class Worker:
    """A process that runs `make_job(*args)` on its first turn, and a turn of that job whenever asked."""

    def __init__(self, make_job: Callable[..., Job], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of the parent's memory is inherited
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_job, *args), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interrupt is for the parent alone
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()  # so that the end of the process is the end of the stream

    def turn(self) -> Any:
        """The result of one turn.

        Raises:
            UnavailableError: the job cannot run here, or does not fit into memory.
            FailedError: the job raised anything else, or its process ended.
        """
        try:
            self._connection.send("turn")
            error, result = self._connection.recv()
        except (EOFError, ConnectionError) as broken:
            self._process.join()
            raise _ended(self._process.exitcode) from broken
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _ended(exit_code: int | None) -> RuntimeError:
    if exit_code == -signal.SIGKILL:
        return UnavailableError("It was killed, most likely because the memory of this machine does not suffice.")
    return FailedError(f"Its process ended with exit code {exit_code}.")


def _serve(connection: Connection, make_job: Callable[..., Job], *args: Any) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # torch.compile leaves no pool of processes behind
    machine.die_first()
    job = None
    with suppress(EOFError, ConnectionError):  # the parent has closed its end
        while True:
            connection.recv()
            try:
                job = job or make_job(*args)
                reply = None, job.turn()
            except Exception as error:  # the boundary of the process: the parent raises it
                reply = _as_reply(error), None
            connection.send(reply)


def _as_reply(error: Exception) -> RuntimeError:
    if isinstance(error, UnavailableError):
        return error
    text = f"{type(error).__name__}: {error}".strip()
    if isinstance(error, MemoryError) or any(phrase in text for phrase in OUT_OF_MEMORY):
        return UnavailableError("The memory of this machine does not suffice.")
    traceback.print_exception(error)
    return FailedError(text.splitlines()[0])
