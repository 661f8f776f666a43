"""Sub-centres are not sharded yet: what asks for it is told so, on every rank."""

import pytest
import torch
from torch.distributed import ProcessGroup

from cosface_kernels import FusedCosFaceLoss, FusedSubCenterArcFaceLoss, margin_softmax_loss


def make(rank: int, group: ProcessGroup) -> None:
    FusedSubCenterArcFaceLoss(8, 4, process_group=group)


def call(rank: int, group: ProcessGroup) -> None:
    weight = FusedCosFaceLoss(8, 4, process_group=group).weight
    margin_softmax_loss(torch.randn(3, 4), weight, torch.tensor([0, 1, 2]), margin=0.2, subcenters=2)


@pytest.mark.parametrize("job", [make, call], ids=lambda job: job.__name__)
def test_is_refused(ranks, job):
    for refusal in ranks.run(2, job):
        assert isinstance(refusal, ValueError)
        assert "sub-centres cannot be sharded over ranks yet" in str(refusal)
