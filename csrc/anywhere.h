// What runs on the CPU and on a GPU.
#pragma once

#ifdef __CUDACC__
#define COSFACE_ANYWHERE __host__ __device__
#else
#define COSFACE_ANYWHERE
#endif
