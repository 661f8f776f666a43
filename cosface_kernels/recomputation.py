"""The state that a head's forward changes, such as a count of draws, under torch.utils.checkpoint.

That runs forward once more inside backward, which must see the state that the first run saw and leave none behind.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cosface_kernels.distributed import agreement_on_rows

REMEMBERED = 32  # forward passes before a backward


@dataclass(eq=False)
class _Pass:
    labels: Tensor  # (N,)
    digest: Tensor  # 0-d, tells apart passes with the same labels
    state: list[Tensor]  # before the pass
    start: int  # the number of the first autograd node that comes after
    records: bool  # whether its nodes do, not so in a reentrant checkpoint, whose own node comes before

    def distance(self, node: int) -> float:
        """How many nodes are between the pass and one that runs it again; inf where that is another's."""
        distance = node - self.start if self.records else self.start - 1 - node
        return distance if distance >= 0 else math.inf


_passes: WeakKeyDictionary[nn.Module, deque[_Pass]] = WeakKeyDictionary()  # not copied or saved with the module


@contextmanager
def state_of_pass(
    module: nn.Module, state: Sequence[Tensor], embeddings: Tensor, labels: Tensor
) -> Iterator[None]:
    """Where forward runs again inside backward, its body finds the state of its first run, and changes none.

    Args:
        module: the head whose forward it is.
        state: 0-d buffers that the body may change.
        embeddings, labels: what forward was given, by which its first run is found.

    Raises:
        RuntimeError: inside backward, for labels that no recent pass was given.
    """
    before = [buffer.clone() for buffer in state]
    start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    if torch._C._current_graph_task_id() == -1:  # backward does not run on this thread
        yield  # which checks the batch
        made = _Pass(labels.clone(), _digest(embeddings), before, start, torch.is_grad_enabled())
        _passes.setdefault(module, deque(maxlen=REMEMBERED)).append(made)
        return
    _restore(state, _first_run(module, embeddings, labels).state)
    try:
        yield
    finally:
        _restore(state, before)


def _digest(embeddings: Tensor) -> Tensor:
    return embeddings.detach().sum(dtype=torch.float32).nan_to_num()


def _first_run(module: nn.Module, embeddings: Tensor, labels: Tensor) -> _Pass:
    """The one whose embeddings are closest, for recomputation may round otherwise.

    Of passes with equal batches, such as the empty ones of a rank, that whose nodes the running one is among.
    """
    same = [each for each in reversed(_passes.get(module, deque())) if torch.equal(each.labels, labels)]
    if not same:
        with agreement_on_rows(cast(Tensor, module.weight), "the batch"):  # in which the other ranks are
            raise RuntimeError(
                f"A forward inside backward, as by torch.utils.checkpoint, has {len(labels)} labels that none of "
                f"the last {REMEMBERED} forward passes of this head had, and so the state of its first run is not "
                "known: call backward sooner, or leave the head outside the checkpoint, since it keeps no logits."
            )
    digest, node = _digest(embeddings), torch._C._current_autograd_node()._sequence_nr()
    return min(same, key=lambda each: (float((each.digest - digest).abs()), each.distance(node)))


@torch.no_grad()
def _restore(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(state, values, strict=True):
        buffer.copy_(value)
