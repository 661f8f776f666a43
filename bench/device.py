"""What `bench gpu` asks of a GPU, and a stand-in on the CPU, so that a rehearsal runs every line but these."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

CLOCK = 2e9  # cycles a second that a GPU has at most, or nearly so


class Gpu:
    name = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in what the device does."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds from one mark to another."""
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def hold(self, seconds: float) -> None:
        """Keeps the device busy, so that it later finds its work in the queue and no mark waits for the host."""
        torch.cuda._sleep(int(seconds * CLOCK))

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a CUDA graph."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return graph.replay

    def peak(self, run: Callable[[], Any]) -> int:
        """Bytes that are allocated at most while `run` runs, beyond those before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    @contextmanager
    def profiled(self):
        """What a profiler that waits for the program's word sees."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        yield
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "memory_gib": properties.total_memory / 2**30,
        }


class Host:
    """Runs at once whatever is asked for; its times mean nothing."""

    name = "cpu"

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, first: float, last: float) -> float:
        return last - first

    def hold(self, seconds: float) -> None:
        pass

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return 0

    def profiled(self) -> AbstractContextManager:
        return nullcontext()

    def facts(self) -> dict[str, Any]:
        return {"device": "none: a rehearsal on the CPU"}
