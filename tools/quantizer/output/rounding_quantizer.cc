#include "tools/quantizer/output/rounding_quantizer.h"

#include <algorithm>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/formats/bf16.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;

// A matrix that is stored unquantised: bf16, the router float32.
HostMatrix ToPlain(HostMatrix matrix, bool is_router) {
  if (is_router || matrix.format == WeightFormat::kBfloat16) return matrix;
  HostMatrix rounded;
  rounded.format = WeightFormat::kBfloat16;
  rounded.k = matrix.k;
  rounded.n = matrix.n;
  rounded.values_bf16.resize(matrix.values_f32.size());
  std::transform(matrix.values_f32.begin(), matrix.values_f32.end(), rounded.values_bf16.begin(),
                 formats::FloatToBfloat16);
  return rounded;
}

}  // namespace

int RoundingQuantizer::NumReadAhead(int num_threads) { return std::clamp(num_threads / 8, 1, 4); }

RoundingQuantizer::RoundingQuantizer(const ModelConfig& config, const Checkpoint& checkpoint,
                                     const Wint2Options& wint2, kernels::cpu::ThreadPool* pool)
    : checkpoint_(checkpoint),
      wint2_(wint2),
      pool_(pool),
      refs_(StoredMatrices(config, config.tie_word_embeddings)) {}

absl::StatusOr<HostMatrix> RoundingQuantizer::Next(const MatrixRef& ref, StoredFormat format) {
  if (reader_ == nullptr) {
    reader_ = std::make_unique<MatrixReader>(
        checkpoint_, std::vector(refs_.begin() + static_cast<int64_t>(num_replayed_), refs_.end()),
        /*rank=*/0, /*world_size=*/1, NumReadAhead(pool_->num_threads()));
  }
  source_ = {};
  ASSIGN_OR_RETURN(HostMatrix matrix, reader_->Next(ref));
  const auto quantized = QuantizedFormat(format);
  if (!quantized.has_value()) return ToPlain(std::move(matrix), ref.role == MatrixRole::kRouter);
  source_ = std::move(matrix);
  const FloatMatrix weights = Widen();
  if (quantized == WeightFormat::kWint2) return EncodeWint2(weights, {}, wint2_, *pool_);
  return EncodePerChannel(*quantized, weights, *pool_);
}

absl::Status RoundingQuantizer::Replay(const MatrixRef& /*ref*/, HostMatrix /*done*/) {
  CHECK(reader_ == nullptr && num_replayed_ < refs_.size());
  ++num_replayed_;
  return absl::OkStatus();
}

FloatMatrix RoundingQuantizer::Widen() {
  if (source_.format == WeightFormat::kFloat32) {
    return {source_.values_f32.data(), source_.k, source_.n};
  }
  CHECK(source_.format == WeightFormat::kBfloat16);
  weights_.resize(source_.k * source_.n);
  pool_->Run(source_.k, source_.k * source_.n, [this](int64_t row, int /*thread*/) {
    const int64_t first = row * source_.n;
    std::transform(source_.values_bf16.begin() + first,
                   source_.values_bf16.begin() + first + source_.n, weights_.begin() + first,
                   formats::Bfloat16ToFloat);
  });
  return {weights_.data(), source_.k, source_.n};
}

}  // namespace wintserve::quantizer
