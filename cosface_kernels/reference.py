"""The definition of the loss and its gradients in plain PyTorch.

This is the specification that every backend is tested against. It materialises the (N, C) logits on purpose.

Notation: x (N, D) embeddings, w (C, D) class weights, targets (N,) with -1 for "no target", or (2, N) of samples
with two different ones, s (N,) scale, m margin, cos_ij = <x_i, w_j> / (|x_i| |w_j|), z_ij = s_i cos_ij, or
s_i N(cos_ij) where options.negatives reshape. Where there are two targets, "j != y_i" is neither of them, and
loss_i is that of the first. With K sub-centres, which is options.subcenters, w is (C K, D), class j owns its rows
jK .. jK + K - 1, and cos_ij is the largest of their cosines; of equal ones the first, which alone has a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cosface_kernels import float8
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.options import PLAIN, Options, Update
from cosface_kernels.options import compute_dtype as compute_dtype

EPS = 1e-12  # smallest norm that is divided by, as in F.normalize


def operand_dtype(x: torch.dtype, w: torch.dtype) -> torch.dtype:
    """What units that multiply matrices of 16 bits multiply, with float32 sums: no matter of this module's own.

    The common dtype; a float32 weight is rounded to the bfloat16 of its embeddings, as autocast would do. Not to
    float16, whose range a short row of an un-normalised weight would leave. Both hold what float8 holds.
    """
    if x == w or (x, w) == (torch.bfloat16, torch.float32) or w is FLOAT8:
        return x
    return torch.float32


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), exact to rounding at both ends (F.softplus drops the tail above its threshold)."""
    return torch.logaddexp(z, torch.zeros_like(z))


def excess(scale: Tensor, top: Tensor, log_sum: Tensor, psi: Tensor) -> Tensor:
    """lse - s psi of lse = s top + log_sum, (N,): what is large cancels before it is rounded."""
    return log_sum + scale * (top - psi)


def forward(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, margin: float, options: Options = PLAIN
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LMCL per sample, differentiable by autograd.

    lse_i = log sum_{j != y_i} e^{z_ij},  loss_i = softplus(lse_i - s_i (cos_iy - m)): CosFace (arXiv:1801.09414),
    Eq. 4, with the target split off, so that a loss of 1e-20 does not cancel to 0. Without a target, cos_iy and
    loss_i are 0 and lse_i runs over all classes.

    lse_i comes as s_i top_i + log_sum_i, where top_i is the largest cos_ij, j != y_i (0 if there is none), and
    log_sum_i is in [0, log C]: in one number the rounding of a large z would be that of the probabilities.

    Returns:
        loss, top (a constant to autograd), log_sum, target_cos and max_neg = max_{j != y_i} cos_ij, each (N,), but
        target_cos in the shape of targets.
    """
    cos = _cosines(x, w, options)  # (N, C)
    each_target = _each_target(targets, cos)  # (1 or 2, N, C)
    target_cos = torch.where(each_target, cos, 0).sum(-1).view(targets.shape)  # (N,) or (2, N)
    is_target = each_target.any(0)  # (N, C)
    shaped, _ = _reshape(cos, options)  # (N, C)
    max_neg, top = (c.detach().masked_fill(is_target, -torch.inf).amax(1) for c in (cos, shaped))  # (N,) each
    top = top.where(top > -torch.inf, 0)  # (N,)
    log_sum = (scale[:, None] * (shaped - top[:, None])).masked_fill(is_target, -torch.inf).logsumexp(1)  # (N,)
    first, first_cos = torch.atleast_2d(targets)[0], torch.atleast_2d(target_cos)[0]  # (N,) each
    loss = softplus(excess(scale, top, log_sum, first_cos - margin)).masked_fill(first < 0, 0)  # (N,)
    return loss, top, log_sum, target_cos, max_neg


def moments(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, top: Tensor, log_sum: Tensor, options: Options = PLAIN
) -> Tensor:
    """What the negatives of a sample sum up to beside log_sum, (4, N).

    1. below_i = sum_{j != y_i} p_ij (top_i - N(cos_ij)) with p_ij = e^{z_ij - lse_i}: how far their mean in the
       softmax lies below the largest of them. Not as a mean, which would cancel where one of them holds all mass.
    2. sum_i = sum_{j != y_i} N(cos_ij)
    3. hard_sum_i, of the cos_ij above the threshold, if there is one; without a gradient.
    4. hard_count_i, how many these are.

    Without negatives, all are 0. Differentiable by autograd with top, a constant, and log_sum of `forward`.
    """
    cos = _cosines(x, w, options)  # (N, C)
    is_target = _each_target(targets, cos).any(0)  # (N, C)
    shaped, _ = _reshape(cos, options)  # (N, C)
    below = top[:, None] - shaped  # (N, C)
    p = (-scale[:, None] * below - log_sum[:, None]).masked_fill(is_target, -torch.inf).exp()  # (N, C)
    hard = torch.zeros_like(is_target)
    if options.thresholds is not None:
        hard = (cos > options.thresholds[:, None]) & ~is_target
    rows = ((p * below).masked_fill(is_target, 0), shaped.masked_fill(is_target, 0), cos.detach() * hard, hard)
    return torch.stack([each.sum(1).to(cos.dtype) for each in rows])


def backward(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: Tensor,
    top: Tensor,
    log_sum: Tensor,
    g_lse: Tensor,
    g_cos: Tensor,
    *,
    options: Options = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those of lse and target_cos, written out.

    G_ij = dL/dcos_ij = s_i g_lse_i p_ij for j != y_i with p_ij = e^{z_ij - lse_i}, and g_cos_i for j = y_i. Where
    negatives are reshaped, z_ij = s_i N(cos_ij) and G_ij has N'(cos_ij) for a factor. The difference of cosines is
    taken first: it is exact near the largest, if both passes round a cosine alike. A row without gradient is zero
    even if its embedding is not finite.

    With b_i and c_i of options.g_moments, G_ij = (s_i t_ij + b_i p_ij + c_i) N'(cos_ij) for j != y_i, where
    t_ij = (g_lse_i + b_i (N(cos_ij) - top_i)) p_ij, and dscale_i = sum_{j != y_i} t_ij N(cos_ij). This adds the
    gradients of `moments`: of sum_i, times c_i, and of below_i, times -b_i, if b_i below_i is in g_lse_i already.

    With options.sigmoid, g_lse is the gradient of the first row of `sigmoid_sums`, log_sum_i = -bias_i, and t_ij =
    g_lse_i p_ij with the p_ij there. Of "cross_entropy", G_ij = s_i t_ij N'(cos_ij) and dscale_i as above, with N'
    the second of the polynomials; of "angle", G_ij = t_ij and dscale_i = 0.

    Returns:
        dx (N, D) and dw (C, D) in the dtype of x and w, and dscale (N,), the part of ds that flows through lse.
        For w in float8, all of whose rows have the exponent 0 here, dw is in the dtype of the results.
    """
    dtype = compute_dtype(x, w)
    g_cos = torch.atleast_2d(g_cos)  # (1 or 2, N)
    b, c = torch.zeros(2, len(x), dtype=dtype, device=x.device) if options.g_moments is None else options.g_moments
    active = (torch.stack([g_lse, b, c, *g_cos]) != 0).any(0)  # (N,)
    x_hat, x_norm = _normalize(x.to(dtype).where(active[:, None], 0))
    w_hat, w_norm = _normalize(w.to(dtype)) if options.normalize_weight else (w.to(dtype), None)
    row_cos = x_hat @ w_hat.T  # (N, C K)
    cos, nearest = _of_classes(row_cos, options)  # (N, C) each
    each_target = _each_target(targets, cos)  # (1 or 2, N, C)
    is_target = each_target.any(0)  # (N, C)
    if options.sigmoid:
        shaped, p = _sigmoids(cos, scale, -log_sum.where(active, torch.inf), options)  # (N, C) each
        t = (g_lse[:, None] * p).masked_fill(is_target, 0)  # (N, C)
        g_neg = t
        if options.polynomials is not None:
            g_neg = scale[:, None] * t * _polynomial(options.polynomials[1], cos)  # (N, C)
    else:
        shaped, slope = _reshape(cos, options)  # (N, C)
        from_top = shaped - top.where(active, 0)[:, None]  # (N, C)
        p = (scale[:, None] * from_top - log_sum.where(active, torch.inf)[:, None]).exp()  # (N, C)
        t = (g_lse[:, None] + b[:, None] * from_top) * p  # (N, C)
        t = t.masked_fill(is_target, 0)
        g_neg = (scale[:, None] * t + b[:, None] * p + c[:, None]) * slope  # (N, C)
    g = torch.where(is_target, torch.where(each_target, g_cos[..., None], 0).sum(0), g_neg)  # (N, C)
    g = _of_rows(g, nearest, options)  # (N, C K)
    dx = _unnormalize(g @ w_hat, (g * row_cos).sum(1), x_hat, x_norm)
    dw = g.T @ x_hat if w_norm is None else _unnormalize(g.T @ x_hat, (g * row_cos).sum(0), w_hat, w_norm)
    dscale = torch.zeros_like(log_sum) if options.sigmoid == "angle" else (t * shaped).sum(1)  # (N,)
    return dx.to(x.dtype), dw if w.dtype is FLOAT8 else dw.to(w.dtype), dscale


def sigmoid_sums(
    x: Tensor, w: Tensor, targets: Tensor, scale: Tensor, bias: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """What the negatives of a sample add, each on its own, and the sum of their p_ij, (N,) each.

    p_ij = 1 / (1 + e^-z_ij) with z_ij = s_i N(cos_ij) + bias_i. Of options.sigmoid "cross_entropy" a negative adds
    log(1 + e^z_ij), with N the first of the polynomials; of "angle" p_ij cos_ij, with N(cos) = -arccos(cos).
    """
    cos = _cosines(x, w, options)  # (N, C)
    is_target = _each_target(targets, cos).any(0)  # (N, C)
    shaped, p = _sigmoids(cos, scale, bias, options)  # (N, C) each
    added = p * cos
    if options.polynomials is not None:
        added = softplus(scale[:, None] * shaped + bias[:, None])
    return added.masked_fill(is_target, 0).sum(1), p.masked_fill(is_target, 0).sum(1)


def nearest(x: Tensor, w: Tensor, k: int, normalize_weight: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest cos_ij of every sample, the largest first, and their j, (N, k) each.

    Of equal ones the lower class comes first; a nan is larger than any number. If not normalize_weight,
    <x_i, w_j> / |x_i| takes the place of cos_ij.
    """
    cos = _cosines(x, w, Options(normalize_weight=normalize_weight))  # (N, C)
    cos, classes = cos.sort(stable=True, dim=1, descending=True)  # (N, C) each
    return cos[:, :k], classes[:, :k]


def _cosines(x: Tensor, w: Tensor, options: Options) -> Tensor:
    dtype = compute_dtype(x, w)
    w_hat = F.normalize(w.to(dtype), eps=EPS) if options.normalize_weight else w.to(dtype)  # (C, D)
    return _of_classes(F.normalize(x.to(dtype), eps=EPS) @ w_hat.T, options)[0]  # (N, C)


def _each_target(targets: Tensor, cos: Tensor) -> Tensor:
    """(1 or 2, N, C), where a class is the first or the second target."""
    return torch.atleast_2d(targets)[..., None] == torch.arange(cos.shape[1], device=cos.device)


def _of_classes(row_cos: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """From the cosines (N, C K) of rows to those of classes, and which of its K rows each is of, (N, C) each."""
    if options.subcenters == 1:
        return row_cos, torch.zeros_like(row_cos, dtype=torch.int64)
    cos, nearest = row_cos.unflatten(1, (-1, options.subcenters)).max(2)
    return cos, nearest


def _of_rows(g: Tensor, nearest: Tensor, options: Options) -> Tensor:
    """The gradient (N, C) of those cosines as that of the rows', (N, C K)."""
    if options.subcenters == 1:
        return g
    rows = g.new_zeros(*g.shape, options.subcenters)
    return rows.scatter_(2, nearest[..., None], g[..., None]).flatten(1)


def _reshape(cos: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """N(cos) and N'(cos), (N, C): (q c + a) c + b and u c + v where c > tau_i, else r c and r."""
    if options.thresholds is None:
        return cos, torch.ones_like(cos)
    q, a, b, r, u, v = options.coefficients(cos.dtype)
    hard = cos > options.thresholds[:, None]
    return torch.where(hard, (q * cos + a) * cos + b, r * cos), torch.where(hard, u * cos + v, r)


def _sigmoids(cos: Tensor, scale: Tensor, bias: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """N(cos) and p of `sigmoid_sums`, (N, C) each."""
    polynomials = options.polynomials
    shaped = -cos.clamp(-1, 1).acos() if polynomials is None else _polynomial(polynomials[0], cos)
    return shaped, torch.sigmoid(scale[:, None] * shaped + bias[:, None])


def _polynomial(coefficients: Tensor, c: Tensor) -> Tensor:
    value = torch.zeros_like(c)
    for k in coefficients.to(c.dtype).flip(0):
        value = value * c + k
    return value


def move_rows(w: Tensor, dw: Tensor, state: list[Tensor], update: Update) -> None:
    """One step of SGD or AdamW on all rows of w, in place; torch.optim.SGD and AdamW define the rules.

    Args:
        w, dw: (C, D); dw as `backward` returns it.
        state: (C, D) each. SGD: the momentum, if any. AdamW: the running means of g and g^2 and, with amsgrad, the
            largest of the latter, of which float8 has the roots. Then the exponents, (C,) int8, of w and of each
            state that is in float8, in this order.
        update: its seed is that of the rounding of tensors in bfloat16 and float8, up or down at random so that
            the expected value is kept.
    """
    dtype = compute_dtype(w, w)
    tensors = [w, *(each for each in state if each.dtype is not torch.int8)]
    of_float8 = iter(each for each in state if each.dtype is torch.int8)
    exponents = [next(of_float8) if each.dtype is FLOAT8 else None for each in tensors]
    squares = [update.rule == "adamw" and k > 1 for k in range(len(tensors))]
    v, *means = (_held(*each, dtype) for each in zip(tensors, exponents, squares, strict=True))  # (C, D) each
    g = update.gradient_factor * dw.to(dtype)  # (C, D)
    if exponents[0] is not None:
        g = g / float8.units(exponents[0], dtype)
    g = g * (update.max_row_norm / g.norm(dim=1, keepdim=True)).clamp_max(1).nan_to_num(1)
    if update.rule == "sgd":
        g = g + update.weight_decay * v
        direction = g
        if means:
            means[0] = update.momentum * means[0] + (1 - update.dampening) * g
            direction = g + update.momentum * means[0] if update.nesterov else means[0]
        v = v - update.lr * direction
    else:
        means[0] = update.beta1 * means[0] + (1 - update.beta1) * g
        means[1] = update.beta2 * means[1] + (1 - update.beta2) * g**2
        if len(means) == 3:
            means[2] = torch.maximum(means[2], means[1])
        mean, square = means[0] / (1 - update.beta1**update.step), means[-1] / (1 - update.beta2**update.step)
        v = v * (1 - update.lr * update.weight_decay) - update.lr * mean / (square.sqrt() + update.eps)
    if update.weight_norm:
        v = v * (update.weight_norm / v.norm(dim=1, keepdim=True).clamp_min(EPS))
    generator = torch.Generator(w.device).manual_seed(hash((update.seed, update.step)) % 2**63)
    for target, exact, of_rows, is_square in zip(tensors, (v, *means), exponents, squares, strict=True):
        if of_rows is not None:
            _hold_in_float8(target, of_rows, exact, is_square, generator)
        else:
            target.copy_(_round_stochastically(exact, generator) if target.dtype == torch.bfloat16 else exact)


def _held(rows: Tensor, exponents: Tensor | None, is_square: bool, dtype: torch.dtype) -> Tensor:
    """What rows of w or of the state are."""
    if exponents is None:
        return rows.to(dtype)
    held = float8.values(rows, exponents, dtype)
    return held**2 if is_square else held


def _hold_in_float8(
    rows: Tensor, exponents: Tensor, exact: Tensor, is_square: bool, generator: torch.Generator
) -> None:
    """A square becomes its root, and no root of a row that has some becomes 0, or its element would leap."""
    exact = exact.sqrt() if is_square else exact
    exponents.copy_(float8.exponents_for(exact.abs().nan_to_num(0, torch.inf).amax(1), exponents))
    exact = exact / float8.units(exponents, exact.dtype)
    if is_square:
        exact = torch.where((exact > 0).any(1, keepdim=True), exact.clamp_min(float8.SMALLEST), exact)
    rows.copy_(float8.rounded(exact, generator))


def _round_stochastically(v: Tensor, generator: torch.Generator) -> Tensor:
    bits = v.float().view(torch.int32)
    noise = torch.randint(1 << 16, v.shape, generator=generator, dtype=torch.int32, device=v.device)
    return torch.where(v.isfinite(), ((bits + noise) & -(1 << 16)).view(torch.float32), v).bfloat16()


def _normalize(v: Tensor) -> tuple[Tensor, Tensor]:
    norm = v.norm(dim=1, keepdim=True)  # (rows, 1)
    return v / norm.clamp_min(EPS), norm


def _unnormalize(g_hat: Tensor, g_dot_v_hat: Tensor, v_hat: Tensor, norm: Tensor) -> Tensor:
    """From the gradient of v_hat = v / max(|v|, eps) to that of v; a clamped row has no projection term."""
    projection = torch.where(norm > EPS, g_dot_v_hat[:, None] * v_hat, 0)
    return (g_hat - projection) / norm.clamp_min(EPS)
