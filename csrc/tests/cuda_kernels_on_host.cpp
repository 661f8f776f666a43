// The CUDA kernels, unchanged, for the host.
#include "cuda/backward.cu"
#include "cuda/forward.cu"
#include "cuda/update.cu"
