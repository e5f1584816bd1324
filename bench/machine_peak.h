// What one core of this machine can do at most, measured: the roof that kernels are compared with.
#pragma once

namespace wintserve::bench {

// Fused multiply-adds of float32 in registers, counted as two operations each.
double MeasurePeakGflops();

// Reading a buffer far larger than the last-level cache.
double MeasureReadGigabytesPerSecond();

}  // namespace wintserve::bench
