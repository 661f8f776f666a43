"""Under DistributedDataParallel the head is a module like any other."""

import copy

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.distributed import destroy_process_group

WORLD = 2


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 8)
        self.head = FusedCosFaceLoss(40, 8, scale=16.0)

    def forward(self, data, labels):
        return self.head(self.net(data), labels)


def _batch():
    rng = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=rng), torch.randint(40, (8,), generator=rng)


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, labels = (t.chunk(WORLD)[rank] for t in _batch())
    for _ in range(3):
        optimizer.zero_grad()
        model(data, labels).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    del model  # which holds the group
    destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """Halves of a batch on two ranks: the same weights on both, and those of the whole batch on one."""
    multiprocessing.spawn(_train, (str(tmp_path),), nprocs=WORLD)
    model = Model()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*_batch()).backward()
        optimizer.step()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, want in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], want, rtol=1e-4, atol=1e-6)
        assert not torch.equal(want, start[name])
