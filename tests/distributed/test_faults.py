"""Real processes of which one is lost in the middle of a step: the others say so, and a restart goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import patience

SCRIPT = Path(__file__).parents[1] / "support" / "elastic.py"
WORLD, STEPS, LOST_RANK, LOST_STEP = 3, 8, 1, 5
LIMIT = patience(120)  # seconds after which a test gives the ranks up as hanging; their own timeout is 20


def _arguments(folder: Path, step: int, by: signal.Signals) -> list[str]:
    return [str(SCRIPT), str(folder), str(STEPS), str(LOST_RANK), str(step), str(int(by))]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_other_ranks_fail_and_say_why(tmp_path, by):
    """Nothing watches over these processes: each finds out by itself that another has died or does not answer."""
    ranks = []
    for rank in range(WORLD):
        place = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "RENDEZVOUS": f"file://{tmp_path}/rendezvous"}
        command = [sys.executable, *_arguments(tmp_path, LOST_STEP, by)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    try:
        for rank, process in enumerate(ranks):
            if rank != LOST_RANK:
                _, errors = process.communicate(timeout=LIMIT)
                assert process.returncode == 1, errors
                assert (
                    f"failed on rank {rank} of {WORLD}: another rank has ended, hangs or cannot be reached"
                    in errors
                )
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stderr.close()


def _torchrun(folder: Path, lost_step: int) -> dict[int, list[str]]:
    """The loss of each step on each rank; a step that was done again, as it was done last."""
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command = [*launcher, "--max-restarts=1", *_arguments(folder, lost_step, signal.SIGKILL)]
    # torch 2.13 keeps one store for all starts, in which gloo may find the addresses of the start before
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command, env={**os.environ, **fresh_store}, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("exitcode: -9" in done.stderr) == (lost_step < STEPS)
    lines = {rank: (folder / f"losses-{rank}").read_text().splitlines() for rank in range(WORLD)}
    return {rank: list(dict(line.split() for line in rows).items()) for rank, rows in lines.items()}


def test_a_restart_continues_the_loss_curve(tmp_path):
    """Killed in step 5, started again from the checkpoint of step 3: the losses of a run without the accident.

    To the bit, with dropout, BatchNorm, AdamW and random data.
    """
    interrupted, undisturbed = _torchrun(tmp_path / "a", LOST_STEP), _torchrun(tmp_path / "b", STEPS)
    assert interrupted == undisturbed
    assert len(undisturbed[0]) == STEPS
