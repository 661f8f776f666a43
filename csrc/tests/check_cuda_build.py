"""Run by `make cuda-check`: the module has its CUDA side, and says what it lacks."""

import torch

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.backends import cuda
from cosface_kernels.backends.extension import _C

assert hasattr(_C, "cuda_version"), cuda.unavailable()

head = FusedCosFaceLoss(7, 4)
x, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 6, 3])
head(x, labels).backward()  # on the CPU, by the same module
assert x.grad.isfinite().all()
assert head.weight.grad.any()

if torch.cuda.is_available():
    on_gpu = FusedCosFaceLoss(7, 4, device="cuda", backend="cuda")
    assert on_gpu(x.cuda(), labels.cuda()).isfinite()
    in_float8 = FusedCosFaceLoss(7, 4, device="cuda", backend="cuda", dtype=torch.float8_e4m3fn)
    assert in_float8(x.cuda(), labels.cuda()).isfinite()
    print(f"The extension runs: {cuda.describe()}.")
else:
    head.backend = "cuda"
    message = ""
    try:
        head(x, labels)
    except RuntimeError as error:
        message = str(error)
    assert "sees no CUDA device." in message, message
    print(f"The extension is built and imported; a call says: {message}")
