"""Gradients of a replicated backbone and of sharded heads together: their norm, and what of them overflows."""

import math
import reprlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cosface_kernels.collectives import naming


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over a replicated backbone and sharded heads together.

    Args:
        parameters: plain ones, whose gradients every rank holds in full and which may be sparse, and DTensors, in
            any order; or one of them.
        max_norm: the gradients are multiplied by max_norm / norm if their norm is larger.
        norm_type: p of the p-norm; inf for the largest magnitude.
        process_group: the ranks that hold the plain parameters, which all make the call; needed where heads are
            sharded over some of them alone, and then the norm is that of all these heads.

    Returns:
        The 0-d norm of all gradients before clipping, the same on every rank.

    Raises:
        TypeError: something is no parameter, such as a head.
        ValueError: process_group is needed.
    """
    several = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    given: list[Any] = list(parameters) if several else [parameters]
    for each in given:
        if not isinstance(each, Tensor):
            raise TypeError(f"clip_grad_norm_ takes parameters, got {type(each).__name__} {reprlib.repr(each)}.")
    meshes = _by_mesh(given, process_group)
    norms, of_some = [], []
    for mesh, members in meshes.items():
        norm = get_total_norm([_entries(p.grad) for p in members if p.grad is not None], norm_type)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if process_group is None or mesh is None or mesh.size() == process_group.size():
            norms.append(norm)
        else:
            of_some.append(norm / mesh.size() ** (1 / norm_type))  # the share of each of its ranks
    if process_group is not None:
        share = get_total_norm(of_some, norm_type).to(given[0].device, torch.float64)
        largest = math.isinf(norm_type)
        sums = share if largest else share**norm_type
        with naming("adding up the heads' norms", process_group):
            dist.all_reduce(sums, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, process_group)
        norms.append((sums if largest else sums ** (1 / norm_type)).float())
    total = get_total_norm(norms, norm_type)
    for members in meshes.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total


def _entries(gradient: Tensor) -> Tensor:
    """All that can differ from 0: of one of sampled classes, their rows."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for an optimizer of a replicated backbone and sharded heads together.

    What overflows on one rank is skipped on all: DTensor agrees on that of a shard, averaging has spread that
    of a replicated gradient. With an optimizer for each, one would step where the other skips.

    Args:
        process_group: as of `clip_grad_norm_`; the others are those of torch's.
    """

    def __init__(self, *arguments: Any, process_group: ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.process_group = process_group

    def _unscale_grads_(  # the method in which torch's looks at gradients
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = {}
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        for members in _by_mesh(parameters, self.process_group).values():
            part: Any = SimpleNamespace(param_groups=[{"params": members}])
            for device, value in super()._unscale_grads_(part, inv_scale, found_inf, allow_fp16).items():
                found[device] = torch.maximum(found.get(device, value), value)
        if self.process_group is not None:
            for value in found.values():
                with naming("agreeing on an overflow", self.process_group):
                    dist.all_reduce(value, dist.ReduceOp.MAX, self.process_group)
        return found


def _by_mesh(parameters: Iterable[Tensor], group: ProcessGroup | None) -> dict[DeviceMesh | None, list[Tensor]]:
    """Those with a gradient, plain ones apart from DTensors, because torch computes on lists of one kind."""
    meshes: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            meshes.setdefault(mesh, []).append(parameter)
    if group is None and any(meshes):
        sizes = {dist.get_world_size() if mesh is None else mesh.size() for mesh in meshes}
        if len(sizes) > 1:
            raise ValueError(
                f"process_group must be the ranks that hold the plain parameters, where heads are sharded over "
                f"{min(sizes)} of {max(sizes)} ranks: else each group of ranks would move the same backbone by a "
                "norm or an overflow of its own; got None."
            )
    return meshes
