"""A refusal says what to do; who does it, to the letter, trains on."""

import copy
import itertools
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.steps import C, D, batch, make_head
from torch import nn

from cosface_kernels.backends import BACKENDS
from cosface_kernels.optim import FusedAdamW, FusedSGD, row_optimizer

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


class Run:
    """A training: a backbone, a head, the optimizer of both, and a step after another."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.head, self.backbone, self.scaler = make_head(), nn.Linear(D, D), None
        self.seeds = itertools.count()
        self.other = lambda: self.head.weight.square().sum()
        self.takes()
        for _ in range(2):
            self.turn()
        self.saved = copy.deepcopy([each.state_dict() for each in (self.head, self.optimizer)])

    def takes(self, kind=FusedSGD, **options):
        self.optimizer = kind([*self.backbone.parameters(), *self.head.parameters()], lr=0.1, **options)

    def end(self):
        self.optimizer.step()

    def restore(self):
        for each, state in zip((self.head, self.optimizer), self.saved, strict=True):
            each.load_state_dict(copy.deepcopy(state))

    def loss(self, size=1):
        x, labels = (torch.cat(each) for each in zip(*(batch(next(self.seeds)) for _ in range(size)), strict=True))
        return self.head(self.backbone(x), labels)

    def backward(self):
        (self.loss() if self.scaler is None else self.scaler.scale(self.loss())).backward()

    def turn(self, *backwards):
        """One step of a loop as most are."""
        self.optimizer.zero_grad()
        for backward in backwards or (self.backward,):
            backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


# -- what is refused ---------------------------------------------------------------------------------------------


def too_late(run):
    run.backward()
    run.other().backward()


def too_late_at_once(run):
    (run.loss() + run.other()).backward()


def twice(run):
    run.backward()
    run.backward()


def in_the_backbone(run):
    def fails(gradient):
        handle.remove()
        raise RuntimeError("out of memory")

    handle = run.backbone.weight.register_hook(fails)
    run.backward()


def in_the_second_of_two_heads(run):
    """Of the first, the rows have moved once."""
    second = make_head()
    run.optimizer.add_param_group({"params": second.parameters()})
    only, run.loss = run.loss, lambda: only() + second(*batch())
    run.backward()
    second(*batch()).backward()


def stepped(refused):
    """What step() says of it."""

    def steps(run):
        with suppress(RuntimeError):
            refused(run)
        run.optimizer.step()

    steps.__name__ = f"step after {refused.__name__}"
    return steps


def clipped(run):
    run.backward()
    nn.utils.clip_grad_norm_(run.head.parameters(), 1.0)


def owned_by_a_later_one(run):
    run.later = FusedSGD(run.head.parameters(), lr=0.1)
    run.turn()


def owned_by_one_of_torch_too(run):
    run.backward()
    torch.optim.SGD(run.head.parameters(), lr=0.1).step()


def sampled(run):
    run.head = make_head(sample_rate=0.5)
    run.takes(accumulate=True)
    run.turn()


def sampled_by_torch(run):
    run.head = make_head(sample_rate=0.5)
    run.takes(torch.optim.AdamW)
    run.turn()


def hooked(run):
    run.handle = run.head.weight.register_hook(lambda gradient: None)
    run.turn()


def captured(run):
    with run.monkeypatch.context() as patch:
        patch.setattr(row_optimizer, "is_capturing", lambda: True)
        run.backward()


def not_finite(run):
    (run.loss() * torch.nan).backward()


def not_scaled(run):
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.takes(grad_scaler=run.scaler)
    run.loss().backward()


def scaled_by_another(run):
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.turn()


def interrupted(run):
    def fails(*_, **__):
        raise KeyboardInterrupt

    with run.monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(BACKENDS["cpu"], "backward_update_", fails)
        run.backward()
    run.turn()


def saved_too_soon(run):
    run.backward()
    run.optimizer.state_dict()


def resized_too_soon(run):
    run.backward()
    run.head.resize_classes_(new=4, optimizer=run.optimizer)


def replaced(run):
    loss = run.loss()
    run.head.weight.data = run.head.weight.data.clone()
    loss.backward()


def changed(run):
    loss = run.loss()
    with torch.no_grad():
        run.head.weight.mul_(2)
    loss.backward()


def grown(run):
    run.takes(momentum=0.9)
    run.turn()
    run.head.weight.data = torch.cat([run.head.weight.data, torch.randn(4, D)])
    run.turn()


def strided(run):
    run.head.weight.data = torch.randn(C, 2 * D)[:, ::2]
    run.turn()


# -- the ways out, which return a step of the training if it is another one ---------------------------------------


def none(run):
    """The next batch."""


def zero_grad_once(run):
    run.optimizer.zero_grad()
    run.optimizer.zero_grad = lambda: run.head.zero_grad()  # which says nothing to the optimizer
    run.turn()
    del run.optimizer.zero_grad


def other_first(run):
    return lambda: run.turn(lambda: run.other().backward(), run.backward)


def accumulating(run):
    run.takes(accumulate=True)
    return lambda: run.turn(run.backward, lambda: run.other().backward(), run.backward)


def concatenated(run):
    return lambda: run.turn(lambda: run.loss(size=2).backward())


def with_option(name, value):
    def sets(run):
        run.optimizer.step()
        for group in run.optimizer.param_groups:
            group[name] = value

    sets.__name__ = name
    return sets


def clipping_the_backbone(run):
    clip = nn.utils.clip_grad_norm_
    run.optimizer.step()
    return lambda: run.turn(run.backward, lambda: clip(run.backbone.parameters(), 1.0))


def clipping_all(run):
    run.optimizer.step()
    run.takes(accumulate=True)
    return lambda: run.turn(lambda: clipped(run))


def with_the_later_one(run):
    run.later.step()
    run.optimizer = run.later
    run.optimizer.add_param_group({"params": run.backbone.parameters()})


def taking(**options):
    def takes(run):
        run.takes(**options)

    takes.__name__ = f"taking {', '.join(options)}"
    return takes


def sampling_none(run):
    run.head = make_head()
    run.takes(type(run.optimizer))


def unhooked(run):
    run.handle.remove()


def scaler_given(run):
    run.takes(grad_scaler=run.scaler)
    run.restore()


def scaler_set(run):
    run.optimizer.grad_scaler = run.scaler
    run.restore()


def after_step(call):
    def steps(run):
        run.optimizer.step()
        call(run)

    steps.__name__ = f"{call.__name__} after step"
    return steps


def state_dict(run):
    run.optimizer.state_dict()


def resizing(run):
    run.head.resize_classes_(new=4, optimizer=run.optimizer)


def state_dropped(run):
    run.optimizer.state.pop(run.head.weight)


ACCUMULATE = "construct the optimizer with accumulate=True"
ZERO_GRAD = "Call zero_grad(), which ends the step"
WAYS_OUT = [
    (too_late, "Run that backward before the head's", other_first),
    (too_late, "; then run the other loss's backward before the head's", other_first),
    (too_late_at_once, "Run that backward before the head's", other_first),
    (too_late, ACCUMULATE, accumulating),
    (too_late_at_once, ACCUMULATE, accumulating),
    (twice, "Call step() after each backward", none),
    (twice, "concatenate their embeddings and labels", concatenated),
    (twice, ACCUMULATE, accumulating),
    (twice, "`zero_grad()`, which ends the step", zero_grad_once),
    (in_the_second_of_two_heads, "`zero_grad()`, which ends the step", zero_grad_once),
    *((stepped(refused), ZERO_GRAD, zero_grad_once)
      for refused in (too_late, too_late_at_once, twice, in_the_backbone, in_the_second_of_two_heads)),
    (clipped, "`step()`, which ends this step", Run.end),
    (clipped, "set gradient_factor", with_option("gradient_factor", 0.5)),
    (clipped, "or max_row_norm", with_option("max_row_norm", 0.5)),
    (clipped, "clip the backbone alone", clipping_the_backbone),
    (clipped, ACCUMULATE, clipping_all),
    (owned_by_a_later_one, "keep one optimizer for a weight, whose `step()` ends this step", with_the_later_one),
    (owned_by_one_of_torch_too, "`step()`, which ends this step", Run.end),
    (sampled, "construct the optimizer without accumulate=True", taking()),
    (sampled, "or the head with sample_rate=1", sampling_none),
    (sampled_by_torch, "take FusedSGD", taking(kind=FusedSGD)),
    (sampled_by_torch, "or FusedAdamW", taking(kind=FusedAdamW)),
    (sampled_by_torch, "or sample_rate=1", sampling_none),
    (hooked, "remove the hook", unhooked),
    (hooked, ACCUMULATE, taking(accumulate=True)),
    (captured, f"{ACCUMULATE} and call step() outside of the graph", taking(accumulate=True)),
    (not_finite, "Look for nan or inf in embeddings, weight and loss", none),
    (not_finite, 'nonfinite="skip" leaves such batches out', taking(nonfinite="skip")),
    (not_scaled, "call scaler.scale(loss).backward()", none),
    (scaled_by_another, "construct the optimizer with grad_scaler=scaler", scaler_given),
    (scaled_by_another, "or set optimizer.grad_scaler to it, and restore the weight", scaler_set),
    (interrupted, "head.load_state_dict(...), then optimizer.load_state_dict(...)", Run.restore),
    (saved_too_soon, "Save after step()", after_step(state_dict)),
    (resized_too_soon, "call the optimizer's step() first", after_step(resizing)),
    (replaced, "run backward on the loss first", none),
    (changed, "call backward first", none),
    (grown, "a new optimizer", taking(momentum=0.9)),
    (grown, "`optimizer.state.pop(weight)`", state_dropped),
    (strided, "a weight in float16 or of another layout is for `torch.optim`", taking(kind=torch.optim.SGD)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("refused", "advice", "way_out"), WAYS_OUT, ids=[f"{r.__name__}-{w.__name__}" for r, _, w in WAYS_OUT]
)
def test_who_does_what_a_refusal_says_trains_on(refused, advice, way_out, monkeypatch):
    run = Run(monkeypatch)
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        refused(run)
    message = str(refusal.value)
    del refusal  # whose frames hold an optimizer
    assert advice in message or any(advice in row for row in rows_of(message))
    turn = way_out(run) or run.turn
    for _ in range(3):
        before = [each.weight.detach().clone() for each in (run.backbone, run.head)]
        turn()
        moved = [
            not torch.equal(*pair) for pair in zip(before, (run.backbone.weight, run.head.weight), strict=True)
        ]
        assert moved == [True, True]


def rows_of(message):
    """What docs/troubleshooting.md says of it."""
    for row in re.findall(r"^\| `.*", PAGE.read_text(), re.MULTILINE):
        for told in re.findall("`(.+?)`", row.split(" | ")[0]):
            if re.search(".*".join(map(re.escape, told.split("…"))), message):
                yield row
