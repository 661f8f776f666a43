"""Optimizers that move the rows of a head's weight inside backward, a tile of classes at a time.

The gradient of the weight never exists: backward has a tile of it in cache, moves these rows and forgets it. An
optimizer owns its weights: the loss functions look for the owner of the weight they are given and, if there is
one, take an autograd node whose backward calls torch.ops.cosface.lmcl_backward_update_. That node breaks the graph
of torch.compile.

    optimizer = FusedSGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    loss = head(backbone(images), labels)
    loss.backward()      # moves head.weight; head.weight.grad holds no numbers
    optimizer.step()     # moves all others by their gradients, and ends the step

Rows move in a backward that a step was meant by: one that would have added to weight.grad, in training mode. A
weight whose gradient is needed as a whole (another loss has one too, several heads share it in one backward, or
torch.autograd.grad asks for it) gets an ordinary one, which `step()` takes as torch.optim does. The table of what
moves, what adds up and what is refused is in docs/optimizers.md.

Between backward and `step()` there is no gradient to work on: learning rate, clipping and the scale of the loss
must be known before backward. A step that was interrupted leaves some rows moved and others not; the weight then
is unusable, and whatever reads it says so.

Of a weight that is sharded over ranks, each moves its own rows; the state is sharded like the weight. Forward
raises on every rank if a step has ended on some of them alone.
"""

from cosface_kernels.optim.autograd import lmcl, moves, sigmoid
from cosface_kernels.optim.checks import MOVABLE, check_gradient
from cosface_kernels.optim.consumed_gradient import ConsumedGradient
from cosface_kernels.optim.ownership import (
    IDLE,
    MARK,
    MOVED,
    MOVING,
    OWNERSHIP,
    REFUSED,
    SKIPPED,
    Ownership,
    check_between_steps,
    note_loaded,
    note_use,
    options_of,
    owner_of,
    ownership_of,
    progress,
    restoring,
)
from cosface_kernels.optim.row_optimizer import NONFINITE, OF_THE_OPTIMIZER, WEIGHT_SEEDS, RowOptimizer
from cosface_kernels.optim.rules import FusedAdamW, FusedSGD

__all__ = [
    "IDLE",
    "MARK",
    "MOVABLE",
    "MOVED",
    "MOVING",
    "NONFINITE",
    "OF_THE_OPTIMIZER",
    "OWNERSHIP",
    "REFUSED",
    "SKIPPED",
    "WEIGHT_SEEDS",
    "ConsumedGradient",
    "FusedAdamW",
    "FusedSGD",
    "Ownership",
    "RowOptimizer",
    "check_between_steps",
    "check_gradient",
    "lmcl",
    "moves",
    "note_loaded",
    "note_use",
    "options_of",
    "owner_of",
    "ownership_of",
    "progress",
    "restoring",
    "sigmoid",
]
