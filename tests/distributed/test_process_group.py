"""A process group that is ended is held by nothing, whatever the end, so that its threads are gone."""

import json

from support import run_python

CODE = """
import gc, json, weakref
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.distributed import clip_grad_norm_, destroy_process_group
from cosface_kernels.optim import FusedSGD
gc.disable()

def train(error=None):
    backbone = DistributedDataParallel(torch.nn.Linear(3, 4))
    head = FusedCosFaceLoss(5, 4, process_group=dist.group.WORLD)
    parameters = [*backbone.parameters(), *head.parameters()]
    for kind in (torch.optim.AdamW, FusedSGD):
        optimizer = kind(parameters, lr=0.1)
        head(backbone(torch.ones(2, 3)), torch.tensor([0, 4])).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if error is not None:
        raise error

def cause_and_context():
    try:
        train(KeyError())
    except KeyError as error:
        cause = error
        cause.__cause__ = cause  # a cycle
    try:
        train(OSError())
    except OSError:
        raise ValueError from cause

ends, held = {"return": train, "cause and context": cause_and_context}, {}
for error in (ValueError, KeyboardInterrupt, SystemExit):
    ends[error.__name__] = lambda error=error: train(error())
for name, end in ends.items():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    try:
        try:
            end()
        finally:
            destroy_process_group()
            held[name] = group() is not None
    except BaseException:
        pass
print(json.dumps(held))
"""


def test_nothing_holds_a_group_that_is_ended():
    done = run_python(CODE)
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])  # torch 2.10 tells above what gloo connects
    assert len(held) == 5
    assert not any(held.values()), held
