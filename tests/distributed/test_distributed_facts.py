"""What decides a rank's collectives is agreed before the first of them: no rank waits or raises alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cosface_kernels import FusedAdaFaceLoss, FusedCosFaceLoss, FusedMarginLoss, FusedUniFaceLoss, collectives
from cosface_kernels.margins import ArcFaceMargin, Margin
from cosface_kernels.optim import FusedAdamW, FusedSGD

ALIKE = "must be the same on every rank"


class Scheduled(Margin):
    """Holds a function and an object, which have an address of their own in every process."""

    def __init__(self):
        super().__init__()
        self.of, self.schedule = (lambda cos: cos - 0.25), {"warm-up": [nn.Identity(), object()]}

    def forward(self, cos, rows):
        return self.of(cos)


def _scheduled(rank, group):
    losses = []
    for margin in (Scheduled(), 0.25):
        torch.manual_seed(0)
        head = FusedMarginLoss(7, 5, margin, process_group=group)
        losses.append(head(torch.ones(2, 5), torch.tensor([rank, 6])).item())
    return losses


def test_functions_and_objects_of_a_margin_are_alike_by_their_names(ranks):
    for scheduled, plain in ranks.results(3, _scheduled):
        assert scheduled == pytest.approx(plain, rel=1e-6)


def _in_another_order(rank, group):
    """Facts, options and tensors, and an optimizer's state of each class, which was loaded in that order."""
    facts = {"a": 1, "b": torch.zeros(2), "c": torch.ones(2)}
    turned = dict(reversed(facts.items())) if rank == 1 else facts
    collectives.agree(group, torch.device("cpu"), turned)
    torch.manual_seed(0)
    states = []
    for turns in (False, rank == 1):
        torch.manual_seed(0)
        head = FusedCosFaceLoss(7, 5, process_group=group)
        optimizer = FusedAdamW(head.parameters(), lr=0.1)
        head(torch.randn(2, 5, requires_grad=True), torch.tensor([0, 6])).backward()
        optimizer.step()
        if turns:
            for kept in (optimizer.state[head.weight], *optimizer.param_groups):
                turned = dict(reversed(kept.items()))
                kept.clear()
                kept.update(turned)
        head(torch.randn(2, 5), torch.tensor([0, 6]))
        head.resize_classes_(keep=range(6, -1, -1), new=3, optimizer=optimizer)
        states.append({name: optimizer.state[head.weight][name].to_local() for name in ("exp_avg", "exp_avg_sq")})
    return [torch.equal(states[0][name], states[1][name]) for name in states[0]]


def test_the_order_in_which_a_rank_states_or_keeps_things_does_not_count(ranks):
    assert ranks.results(3, _in_another_order) == [[True, True]] * 3


def _head(group, **options):
    return FusedCosFaceLoss(7, 5, process_group=group, **options)


def _train(head, **options):
    """A step by an optimizer that has them, of a loss that its grad_scaler scales, if it has one."""
    optimizer = FusedSGD(head.parameters(), lr=0.1, **options)
    loss = head(torch.ones(2, 5, requires_grad=True), torch.tensor([0, 6]))
    scaler = options.get("grad_scaler")
    (loss if scaler is None else scaler.scale(loss)).backward()
    optimizer.step()


def _default_dtype(rank, group):
    torch.set_default_dtype(torch.float64 if rank == 1 else torch.float32)
    try:
        _head(group)
    finally:
        torch.set_default_dtype(torch.float32)


def _hook(rank, group):
    head = _head(group)
    if rank == 1:
        head.weight.register_hook(lambda gradient: gradient)
    _train(head)


def _rates(rank, group):
    head = _head(group)
    optimizer = FusedSGD(head.parameters(), lr=torch.tensor(0.100001 if rank == 1 else 0.1))
    head(torch.ones(2, 5, requires_grad=True), torch.tensor([0, 6])).backward()
    optimizer.step()


def _tables(rank, group):
    """Whose digests differ in the upper 32 bits alone, and which have the same 6 digits."""
    margin = nn.Parameter(torch.tensor([0.5 + (rank == 1) * 2.0**-21], dtype=torch.float64))
    FusedMarginLoss(1, 5, margin, process_group=group)(torch.ones(2, 5), torch.tensor([0, 0]))


def _nans(rank, group):
    head = FusedAdaFaceLoss(7, 5, process_group=group)
    bits = torch.tensor([-4194304 if rank == 1 else 0x7FC00000], dtype=torch.int32)
    head.margin.mean.copy_(bits.view(torch.float32)[0])
    head(torch.ones(2, 5), torch.tensor([0, 6]))


def _ref_emb(rank, group):
    x = torch.ones(2, 5)
    _head(group)(x, torch.tensor([0, 6]), ref_emb=x.clone() if rank == 1 else None)


def _class_of_margins(rank, group):
    head = FusedMarginLoss(7, 5, lambda cos: cos - 0.25, process_group=group)
    head.margin = ArcFaceMargin if rank == 1 else head.margin
    head(torch.ones(2, 5), torch.tensor([0, 6]))


def _labels_that_change(rank, group):
    head, labels = _head(group, sample_rate=0.5), torch.tensor([0, 6])
    loss = checkpoint(head, torch.ones(2, 5, requires_grad=True), labels, use_reentrant=False)
    labels.data.add_(rank == 1)  # unseen by autograd, which would raise first
    loss.backward()


class Forgetful(torch.amp.GradScaler):
    def scale(self, outputs):
        return outputs


def _unscaled(rank, group):
    kind = Forgetful if rank == 1 else torch.amp.GradScaler
    _train(_head(group), grad_scaler=kind("cpu", init_scale=4.0))


def _imprint(rank, group):
    samples = torch.ones(2, 5, dtype=torch.float64 if rank == 1 else torch.float32)
    _head(group).resize_classes_(new=1, init=(samples, torch.tensor([7, 7])))


class Wordless:
    def __str__(self):
        raise ValueError("it has no words")


def _agree(group, fact):
    collectives.agree(group, torch.device("cpu"), {"a": 1, "b": fact})


ALONE = {
    "double": (
        lambda rank, group: _train(_head(group).to(torch.float64 if rank == 1 else torch.float32)),
        f"dtype of the weight {ALIKE}, got torch.float32 on rank 0 and torch.float64 on rank 1.",
    ),
    "default dtype": (_default_dtype, f"dtype {ALIKE}, got torch.float32 on rank 0 and torch.float64 on rank 1."),
    "no classes": (
        lambda rank, group: FusedCosFaceLoss(0 if rank == 1 else 7, 5, process_group=group),
        "num_classes must be a positive integer, got 0.",
    ),
    "of a subclass": (
        lambda rank, group: FusedUniFaceLoss(7, 5, sample_rate=2.0 if rank == 1 else 1.0, process_group=group),
        "sample_rate must be in (0, 1], got 2.0.",
    ),
    "no such argument": (
        lambda rank, group: _head(group, **({"centers": 2} if rank == 1 else {})),
        "unexpected keyword argument 'centers'",
    ),
    "sub-centres": (
        lambda rank, group: _head(group, subcenters=2 if rank == 1 else 1),
        "sub-centres cannot be sharded over ranks yet: subcenters must be 1, got 2.",
    ),
    "hook": (_hook, "A hook on a weight of shape (7, 5) would see no gradient"),
    "scales": (
        lambda rank, group: _train(_head(group), grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0 + rank)),
        f"loss scale {ALIKE}, got 4.0 on rank 0 and 5.0 on rank 1.",
    ),
    "unscaled": (_unscaled, "grad_scaler has scaled no loss yet"),
    "logits": (
        lambda rank, group: _head(group).get_logits(torch.ones(2, 3 if rank == 1 else 5)),
        "embeddings have size 3 but the weight expects embedding_size 5.",
    ),
    "nearest": (
        lambda rank, group: _head(group, backend="triton" if rank == 1 else None).topk(torch.ones(2, 5), 2),
        "backend 'triton' cannot run: ",
    ),
    "rates as tensors": (
        _rates,
        f"options of the optimizer {ALIKE}, got FusedSGD with {{'lr': 0.10000000149011612, ",
    ),
    "tables": (_tables, f"margin.margins {ALIKE}, got numbers in [0.5, 0.5], checksum 3fe0000000000000 ("),
    "nans": (_nans, f"margin.mean {ALIKE}, got numbers in [nan, nan], checksum 7fc00000 ("),
    "ref_emb": (_ref_emb, "ref_emb and ref_labels must be None or the embeddings and labels themselves"),
    "a class": (_class_of_margins, "margin must be a margin, got the class ArcFaceMargin"),
    "labels that change": (_labels_that_change, "has 2 labels that none of the last 32 forward passes of this"),
    "sparse": (
        lambda rank, group: _agree(group, torch.eye(2).to_sparse() if rank == 1 else torch.eye(2)),
        "reshape is not implemented for sparse tensors",
    ),
    "without a text": (lambda rank, group: _agree(group, Wordless() if rank == 1 else 0), "it has no words"),
    "imprinting": (_imprint, f"dtype of the embeddings of init {ALIKE}, got torch.float32 on rank 0 and"),
}


def _alone(rank, group, name):
    act, _ = ALONE[name]
    message = None
    try:
        act(rank, group)
    except (ValueError, TypeError, RuntimeError) as error:
        message = f"{error}"
    return message, _head(group)(torch.ones(2, 5), torch.tensor([rank, 6])).item()


@pytest.mark.parametrize("name", ALONE)
def test_what_one_rank_alone_would_raise_all_raise(ranks, name):
    """Else the others would wait for it until the group's timeout, or gloo abort; and all go on."""
    results = ranks.results(3, _alone, name)
    for message, _ in results:
        assert message is not None
        assert ALONE[name][1] in message
    assert len({loss for _, loss in results}) == 1
