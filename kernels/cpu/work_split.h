// How operators are cut into work items: arithmetic only.
#pragma once

#include <algorithm>
#include <cstdint>

namespace wintserve::kernels::cpu {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many multiply-adds a loop costs less than handing part of it to another thread.
inline constexpr int64_t kMinParallelMultiplyAdds = 64 * 1024;

// Rows an item of a matrix product takes. Splitting rows decodes weights again, so it happens only
// when the column tiles alone would leave threads idle, and never below 32 rows.
constexpr int64_t PickItemRows(int64_t num_tiles, int64_t num_rows, int num_threads,
                               int64_t max_rows) {
  constexpr int64_t kMinRows = 32;
  const int64_t wanted_items = num_threads == 1 ? 1 : int64_t{4} * num_threads;
  const int64_t splits = std::max<int64_t>(1, wanted_items / std::max<int64_t>(1, num_tiles));
  return std::clamp(CeilDiv(num_rows, splits), std::min(kMinRows, max_rows), max_rows);
}

}  // namespace wintserve::kernels::cpu
