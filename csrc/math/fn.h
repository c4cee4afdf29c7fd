// LSC_FN stands before every function of math/: usable from device code where a device compiler reads it.
#pragma once

#if defined(__CUDACC__)
#define LSC_FN __host__ __device__
#else
#define LSC_FN
#endif
