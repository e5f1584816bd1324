// Whether kernels may begin before the one before them in a stream has ended, where the device can
// do that and they are made for it (LaunchShape::overlaps_previous). They may: only benchmarks turn
// it off, to show what it is worth. Threading: not while another thread launches.
#pragma once

namespace wintserve::kernels::cuda {

inline bool kernels_may_overlap = true;

}  // namespace wintserve::kernels::cuda
