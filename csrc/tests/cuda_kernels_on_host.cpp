// The CUDA kernels, unchanged, for the host.
#include "cuda/kernels.cu"
