// Marks arithmetic that host and device code share. Its headers compile without a CUDA toolkit, so
// that every index is tested on any machine.
#pragma once

#if defined(__CUDACC__)
#define WINTSERVE_HOST_DEVICE __host__ __device__
#else
#define WINTSERVE_HOST_DEVICE
#endif
