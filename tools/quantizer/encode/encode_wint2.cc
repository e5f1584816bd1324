#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/status_macros.h"
#include "kernels/formats/wint2.h"
#include "tools/quantizer/encode/encode.h"
#include "tools/quantizer/encode/wint2_tile.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;

constexpr int kMaxRadius = 7;
static_assert(2 * kMaxRadius + 1 == kMaxScales);

absl::Status CheckOptions(const Wint2Options& options) {
  if (options.maps.empty()) return absl::InvalidArgumentError("no code map to choose from");
  for (const CodeMap& map : options.maps) RETURN_IF_ERROR(CheckCodeMap(map));
  if (options.local_scale_radius < 0 || options.local_scale_radius > kMaxRadius) {
    return absl::InvalidArgumentError(fmt::format("local_scale_radius {} is not in 0 … {}",
                                                  options.local_scale_radius, kMaxRadius));
  }
  if (options.num_refits < 0) {
    return absl::InvalidArgumentError(fmt::format("num_refits {} is negative", options.num_refits));
  }
  return absl::OkStatus();
}

absl::Status CheckImportance(std::span<const float> importance, int64_t k) {
  if (importance.empty()) return absl::OkStatus();
  if (static_cast<int64_t>(importance.size()) != k) {
    return absl::InvalidArgumentError(
        fmt::format("importance of {} rows for a matrix of {}", importance.size(), k));
  }
  for (int64_t row = 0; row < k; ++row) {
    if (importance[row] >= 0 && std::isfinite(importance[row])) continue;
    return absl::InvalidArgumentError(
        fmt::format("the importance of row {} is {}; it must be finite and not negative", row,
                    importance[row]));
  }
  return absl::OkStatus();
}

// In stored order, the largest one in [1, 2), which no result depends on.
std::vector<float> StoredImportance(std::span<const float> importance, formats::KOrder k_order) {
  std::vector<float> stored(importance.size());
  if (importance.empty()) return stored;
  const float largest = *std::max_element(importance.begin(), importance.end());
  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  for (size_t i = 0; i < stored.size(); ++i) {
    const size_t first = i / kGroupRows * kGroupRows;
    const int row = formats::Wint2TrueRow(static_cast<int>(i - first), k_order);
    stored[i] = std::ldexp(importance[first + row], -exponent);
  }
  return stored;
}

}  // namespace

absl::StatusOr<HostMatrix> EncodeWint2(FloatMatrix w, std::span<const float> importance,
                                       const Wint2Options& options,
                                       kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckOptions(options));
  RETURN_IF_ERROR(CheckWeights(w, pool));
  RETURN_IF_ERROR(CheckImportance(importance, w.k));
  if (w.k % (2 * formats::kWint2GroupSize) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("{} rows: wint2 needs a multiple of {}", w.k, 2 * formats::kWint2GroupSize));
  }
  Wint2Plan plan;
  for (const CodeMap& map : options.maps) plan.codebooks.emplace_back(map);
  plan.importance = StoredImportance(importance, options.k_order);
  for (const Codebook& codebook : plan.codebooks)
    plan.norms.emplace_back(codebook, plan.importance);
  plan.k_order = options.k_order;
  plan.local_scale_radius = options.local_scale_radius;
  plan.num_refits = options.num_refits;

  HostMatrix out = formats::MakeHostMatrix(formats::WeightFormat::kWint2, w.k, w.n);
  out.k_order = options.k_order;
  std::vector<TileEncoder> encoders(pool.num_threads(), TileEncoder(plan, w.k));
  pool.Run(
      (w.n + kTileColumns - 1) / kTileColumns, w.k * w.n * kNumBytes,
      [&](int64_t item, int thread) { encoders[thread].Encode(w, item * kTileColumns, &out); });
  return out;
}

}  // namespace wintserve::quantizer
