"""The ops called with what does not fit: a sentence that names the tensor, and no memory but theirs is touched.

`make sanitize` runs this file on a module under AddressSanitizer.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from support import Backend, where_taken
from torch import Tensor

from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import Update

N, C, D, S = 5, 400, 12, 90
UPDATES = {
    "sgd": Update("sgd", 2, 0, 1.0, math.inf, 0.1, 0.0, momentum=0.9),
    "adamw": Update("adamw", 2, 0, 1.0, math.inf, 0.1, 0.0, beta1=0.9, beta2=0.99, eps=0.1),
}
OPS = ("lmcl", "lmcl_backward", "lmcl_backward_update_", "apply_update_", "nearest")


class Call:
    """An op with tensors that fit, some of which a test changes; what else it takes does not change."""

    def __init__(self, backend, op: str, *, sampled: bool = False, rule: str = "sgd", **numbers) -> None:
        self.op, self.backend, self.numbers, self.rule = op, backend, numbers, rule
        arguments, options = _fitting(backend, sampled, **numbers)
        names = {
            "lmcl": ["x", "w", "targets", "scale"],
            "apply_update_": ["w", "dw"],
            "nearest": ["x", "w"],
        }.get(op, [*arguments])
        self.arguments: dict[str, Tensor | list[Tensor]] = {
            name: arguments[name] for name in names if op == "apply_update_" or name != "dw"
        }
        if op.endswith("update_"):
            self.arguments["w"] = arguments["w"].clone()
            self.arguments["state"] = [torch.ones_like(arguments["w"]) for _ in range(1 if rule == "sgd" else 3)]
        self.options = {} if op in ("apply_update_", "nearest") else options
        self.arguments |= self.options

    def __call__(self) -> None:
        tensors = [value for name, value in self.arguments.items() if name not in self.options]
        options = {name: self.arguments[name] for name in self.options} | self.numbers
        update, backend = UPDATES[self.rule].flat(), self.backend.name
        if self.op == "lmcl":
            torch.ops.cosface.lmcl(*tensors, 0.3, backend, **options)
        elif self.op == "lmcl_backward":
            torch.ops.cosface.lmcl_backward(*tensors, True, True, backend, **options)
        elif self.op == "lmcl_backward_update_":
            torch.ops.cosface.lmcl_backward_update_(*tensors, None, *update, True, backend, **options)
        elif self.op == "nearest":
            torch.ops.cosface.nearest(*tensors, 3, True, backend)
        else:
            torch.ops.cosface.apply_update_(*tensors, *update, backend)


@functools.cache
def _fitting(backend, sampled: bool, **numbers) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments of lmcl_backward, in order, then dw; and the options that are tensors."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(backend.device)

    x, w, g_lse, g_cos, dw = rows(N, D), rows(C, D), rows(N), rows(N), rows(C, D)
    targets = torch.tensor([0, 3, S - 1, -1, 7], device=backend.device)
    options = {"classes": torch.arange(S, device=backend.device) * 4} if sampled else {}
    if not numbers:
        options |= {"thresholds": rows(N) / 8, "negatives": rows(3)}
    scale = rows(N).abs() + 1
    forward = torch.ops.cosface.lmcl(x, w, targets, scale, 0.3, backend.name, **options, **numbers)
    arguments = {"x": x, "w": w, "targets": targets, "scale": scale, "top": forward[1], "log_sum": forward[2]}
    return {**arguments, "g_lse": g_lse, "g_cos": g_cos, "cache": forward[5], "dw": dw}, options


def _freed(tensor: Tensor) -> Tensor:
    """As those leave it that put a weight's memory elsewhere."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


# name -> what it makes of a tensor that fits
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: torch.cat([t, t[:1]]),
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "of bytes": lambda t: t.to(torch.uint8) if t.dtype != torch.uint8 else t.float(),
    "freed": _freed,
}
# N is the size of x, C that of w, and S that of classes; what is merely read may have another dtype.
FREE = {(name, wrong) for name in ("x", "w", "classes") for wrong in ("longer", "shorter", "empty")}
FREE -= {("classes", "empty")}
FREE |= {(name, "of bytes") for name in ("scale", "thresholds", "negatives", "dw")}


def _cases():
    for op in OPS:
        names = {"apply_update_": ("w", "dw", "state"), "nearest": ("x", "w")}.get(
            op, ("x", "w", "targets", "scale")
        )
        if op in ("lmcl_backward", "lmcl_backward_update_"):
            names += ("top", "log_sum", "g_lse", "g_cos", "cache")
        if op == "lmcl_backward_update_":
            names += ("state",)
        if op.startswith("lmcl"):
            names += ("classes", "thresholds", "negatives")
        yield from (
            (op, name, wrong) for name in names for wrong in WRONG
            if (name, wrong) not in FREE
        )  # fmt: skip


@pytest.mark.parametrize(("op", "name", "wrong"), list(_cases()))
@pytest.mark.option("classes", "thresholds")
def test_what_does_not_fit_is_named(backend, op, name, wrong):
    call = Call(backend, op, sampled=op.startswith("lmcl"))
    change = WRONG[wrong]
    value = call.arguments[name]
    if name == "cache" and not value.numel():
        change = WRONG["one dimension more"]
    call.arguments[name] = [change(values) for values in value] if isinstance(value, list) else change(value)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=rf"\b({name}|cache)\b"):
        call()


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in "xw" if (op, name) != ("apply_update_", "x")]
)
@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu], ids=str
)
def test_no_other_float_is_taken_for_one_that_is_read(op, name, dtype):
    call = Call(Backend("cpu"), op)
    call.arguments[name] = call.arguments[name].to(dtype)
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got {dtype}\.$"):
        call()


@pytest.mark.parametrize("op", OPS[:3])
@pytest.mark.parametrize(
    ("place", "value"),
    [(0, -1), (3, 5), (3, 8), (S - 1, C), (40, 10**12)],
    ids=["below", "later", "twice", "C", "far"],
)
@pytest.mark.option("classes", "thresholds")
def test_classes_ascend_within_the_weight(backend, op, place, value):
    """On a GPU, looking at them would wait for it: there `margin_softmax_loss` does, where it validates labels."""
    if backend.device != "cpu":
        return
    call = Call(backend, op, sampled=True)
    call.arguments["classes"] = call.arguments["classes"].clone()
    call.arguments["classes"][place] = value
    with pytest.raises(ValueError, match=r"classes must ascend within \[0, 400\), got"):
        call()


OTHERWISE_LAID_OUT = {
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("layout", OTHERWISE_LAID_OUT)
@pytest.mark.parametrize("options", where_taken({"cache_bytes": 20_000}, {"gradient_tolerance": 0.01}))
def test_a_cache_lies_in_memory_as_forward_left_it(backend, options, layout):
    call = Call(backend, "lmcl_backward", **options)
    call.arguments["cache"] = OTHERWISE_LAID_OUT[layout](call.arguments["cache"])
    with pytest.raises(ValueError, match=r"^cache must be"):
        call()


@pytest.mark.parametrize("name", ["w", "momentum", "exponents"])
def test_what_is_moved_is_contiguous(backend, name):
    rows = torch.ones(C, D, device=backend.device).to(FLOAT8)
    exponents = torch.zeros(C, dtype=torch.int8, device=backend.device)
    moved = {"w": rows, "momentum": rows.float(), "exponents": exponents}
    moved[name] = OTHERWISE_LAID_OUT["strided"](moved[name])
    w, *state = moved.values()
    with pytest.raises((ValueError, RuntimeError), match=r"contiguous .*got strides [\[(]2"):
        torch.ops.cosface.apply_update_(
            w, torch.ones_like(w, dtype=torch.float32), state, *UPDATES["sgd"].flat(), backend.name
        )


@pytest.mark.parametrize("options", [{"moments": True}, {"subcenters": 2}], ids=str)
@pytest.mark.option("gradient_tolerance", "moments", "subcenters")
def test_a_tolerance_is_of_a_plain_softmax(backend, options):
    problem = backend.problem(5, 40, 8)
    inputs = problem.x, problem.w, problem.targets, problem.scale, 0.3, backend.name
    with pytest.raises(ValueError, match=rf"^{next(iter(options))} cannot have a gradient_tolerance, got 0\.1\.$"):
        torch.ops.cosface.lmcl(*inputs, gradient_tolerance=0.1, **options)


@pytest.mark.parametrize("k", [-1, 0, C + 1])
def test_as_many_of_the_nearest_as_there_are(backend, k):
    x, w = torch.ones(N, D, device=backend.device), torch.ones(C, D, device=backend.device)
    with pytest.raises(ValueError, match=rf"k must be in \[1, 400\], got {k}\."):
        torch.ops.cosface.nearest(x, w, k, True, backend.name)


@pytest.mark.option("exponents")
def test_the_nearest_need_an_exponent_of_each_row(backend):
    x, w = torch.ones(N, D, device=backend.device), torch.ones(C, D, device=backend.device).to(FLOAT8)
    for size, dtype, error in ((C - 1, torch.int8, ValueError), (C, torch.int64, TypeError)):
        exponents = torch.zeros(size, dtype=dtype, device=backend.device)
        with pytest.raises(error, match="exponents must "):
            torch.ops.cosface.nearest(x, w, 3, False, backend.name, exponents)


@st.composite
def changes(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Any tensor, or this one in any strides."""
    kind = draw(st.sampled_from(["as it is", "strided", "expanded", "offset", "freed", "another"]))
    if kind == "as it is":
        return tensor
    if kind == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if kind == "expanded" and tensor.dim():
        return tensor[:1].expand(tensor.shape)
    if kind == "freed":
        return _freed(tensor) if tensor.numel() else tensor
    if kind == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    shape = draw(st.lists(st.sampled_from([0, 1, 2, N, D, S, C]), max_size=3))
    dtype = draw(st.sampled_from([tensor.dtype, torch.float32, torch.float64, torch.bfloat16, torch.int64]))
    return torch.ones(shape, dtype=dtype, device=tensor.device)


@given(data=st.data())
@pytest.mark.option("classes", "thresholds")
def test_anything_is_computed_or_refused(backend, data):
    """Several tensors at once; whatever the op takes, it touches no memory but theirs."""
    op, rule = data.draw(st.sampled_from(OPS)), data.draw(st.sampled_from(list(UPDATES)))
    every = [{}, {"cache_bytes": 20_000}, {"cache_bytes": 10**6}, {"gradient_tolerance": 0.01}]
    options = data.draw(st.sampled_from([some for some in every if not {*some} & {*backend.lacks}]))
    call = Call(backend, op, sampled=data.draw(st.booleans()), rule=rule, **options)
    for name in data.draw(st.lists(st.sampled_from(list(call.arguments)), min_size=1, max_size=3, unique=True)):
        value = call.arguments[name]
        if isinstance(value, list):
            some = value[: data.draw(st.integers(0, len(value)))]
            call.arguments[name] = changed = [data.draw(changes(values)) for values in some]
        else:
            changed = [data.draw(changes(value))]
            call.arguments[name] = changed[0]
        layouts = [(t.dtype, tuple(t.shape), t.stride(), t.untyped_storage().nbytes()) for t in changed]
        note(f"{name} is {layouts}")  # not the tensors: one without memory has no repr
    with contextlib.suppress(ValueError, TypeError, RuntimeError, IndexError, NotImplementedError):
        call()


@pytest.mark.parametrize("options", where_taken({"cache_bytes": 20_000}, {"gradient_tolerance": 0.01}))
@given(data=st.data())
def test_a_cache_of_others_is_refused(backend, options, data):
    """Of the right size, but with what forward never writes, or wrote for other tensors."""
    call = Call(backend, "lmcl_backward", **options)
    cache = call.arguments["cache"].clone()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(cache) // 8 - 1))
        cache[: len(cache) // 8 * 8].view(torch.int64)[at] = data.draw(st.integers(-(2**63), 2**63 - 1))
    call.arguments["cache"] = cache
    with contextlib.suppress(ValueError, RuntimeError):
        call()


def test_a_thread_says_what_it_found():
    """The places of kept entries are looked at where they are read, on torch's threads: rows may have moved."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator) for shape in ((40, 16), (2000, 16), (2, 40)))
    targets, scale = torch.arange(40), torch.full((40,), 64.0)
    _, top, log_sum, *_, cache, _ = torch.ops.cosface.lmcl(
        x, w, targets, scale, 0.3, "cpu", gradient_tolerance=0.01
    )
    cache[len(cache) // 3 :] = 255
    with pytest.raises(RuntimeError, match=r"^cache must be what lmcl returned for these tensors and options\.$"):
        torch.ops.cosface.lmcl_backward(
            x, w, targets, scale, top, log_sum, *g, cache, True, True, "cpu", gradient_tolerance=0.01
        )
