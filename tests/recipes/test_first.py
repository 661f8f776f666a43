"""What the first process does alone may take longer than a collective; if it dies, the others end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import patience

TIMEOUT = 10 * patience(1)  # seconds, of the process group
CODE = """
import gc, os, sys, time, traceback, weakref
from datetime import timedelta
import torch, torch.distributed as dist
from cosface_recipes import first
rank, folder, kind, timeout = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
first.SIGN_EVERY = timeout / 10
dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=timeout), rank=rank, world_size=2)
group = weakref.ref(dist.group.WORLD)
gc.collect()
gc.disable()
def work():
    if kind == "dies":
        os._exit(3)
    if kind == "fails":
        raise ValueError("there is no such folder")
    calls.append(kind)
    time.sleep(1.5 * timeout if kind == "is long" and len(calls) == times else 0)
    return kind
failed, calls, times = False, [], {"is long": 2, "is short": 3}.get(kind, 1)
try:
    print([first.first(work, torch.device("cpu")) for _ in range(times)])
except Exception:
    failed = True
    traceback.print_exc()
dist.destroy_process_group()  # which, unlike this package's, collects nothing that first() has left behind
if group() is not None:  # a thread of gloo may abort Python's end
    print("the group is held by", gc.get_referrers(group()), file=sys.stderr, flush=True)
    os._exit(4)
sys.exit(failed)
"""


def _run(folder: Path, kind: str) -> list[tuple[int, str, str]]:
    """Exit status and what was said of both processes."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(folder), kind, str(TIMEOUT)],
            # of which each agent of torchrun has a count of its own
            env={**os.environ, "PYTHONPATH": paths, "TORCHELASTIC_RESTART_COUNT": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=patience(120)) for process in processes]
        return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("kind", "times"), [("is long", 2), ("is short", 3)])
def test_the_others_wait_for_it_however_long_it_takes(tmp_path, kind, times):
    (first, result, errors), (other, waited, others) = _run(tmp_path, kind)
    assert (first, other) == (0, 0), errors + others
    assert result.split("\n")[0] == str([kind] * times)
    assert waited.split("\n")[0] == str([None] * times)


def test_what_it_raises_ends_the_others_with_its_sentence(tmp_path):
    (first, _, errors), (other, _, others) = _run(tmp_path, "fails")
    assert (first, other) == (1, 1), errors + others
    assert "ValueError: there is no such folder" in errors
    assert "ValueError: rank 0 refused: there is no such folder" in others


def test_its_death_ends_the_others(tmp_path):
    (first, _, _), (other, _, others) = _run(tmp_path, "dies")
    assert (first, other) == (3, 1), others
    assert "waiting for what the first process does alone failed on rank 1 of 2: another rank has ended" in others
