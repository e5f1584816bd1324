#include "engine_worker/weights/dummy_source.h"

#include <fmt/format.h>

#include <cmath>

#include "common/check.h"
#include "engine_worker/weights/layout.h"
#include "kernels/plan/dummy_weights.h"
#include "xxhash.h"

namespace wintserve {
namespace {

using formats::DummyMatrix;
using formats::WeightFormat;
using kernels::plan::HashOfCounter;
using kernels::plan::UniformFromHalfToThreeHalves;
using kernels::plan::UniformFromMinusOneToOne;

constexpr uint64_t kMatrixSeed = 0x77696E7473657276;  // any
constexpr uint64_t kVectorSeed = kMatrixSeed + 1;
constexpr double kLogitDeviation = 2;  // neither certain of one token nor indifferent

uint64_t SeedOf(const MatrixRef& ref) {
  constexpr int kFirstExpert = 8;  // kSharedExperts and kDenseMlp are below 0
  return HashOfCounter(kMatrixSeed, static_cast<uint64_t>(ref.role) << 48 |
                                        static_cast<uint64_t>(ref.layer) << 24 |
                                        static_cast<uint64_t>(ref.expert + kFirstExpert));
}

WeightFormat FormatOf(StoredFormat stored, MatrixRole role) {
  return QuantizedFormat(stored).value_or(role == MatrixRole::kRouter ? WeightFormat::kFloat32
                                                                      : WeightFormat::kBfloat16);
}

// In the CUDA layouts; those of the CPU differ by little.
int64_t BytesOfDummy(const DummyMatrix& matrix, MatrixRole role) {
  switch (role) {
    case MatrixRole::kEmbedding:
      return matrix.k * matrix.n * static_cast<int64_t>(sizeof(uint16_t));
    case MatrixRole::kRouter:
      return matrix.k * matrix.n * static_cast<int64_t>(sizeof(float));
    default:
      return kernels::plan::LayOutDummyWeights(matrix, role == MatrixRole::kGateUp).size_bytes();
  }
}

class DummySource final : public WeightSource {
 public:
  DummySource(const ModelConfig& config, const DummyWeightOptions& options,
              kernels::Backend* backend, int rank, int world_size)
      : config_(config),
        options_(options),
        backend_(backend),
        rank_(rank),
        world_size_(world_size) {}

  absl::StatusOr<std::unique_ptr<kernels::WeightMatrix>> NextMatrix(const MatrixRef& ref) override {
    return backend_->MakeDummy(DescribeDummyMatrix(config_, ref, rank_, world_size_),
                               UseOf(ref.role));
  }

  int64_t BytesOf(const MatrixRef& ref) const override {
    return BytesOfDummy(DescribeDummyMatrix(config_, ref, rank_, world_size_), ref.role);
  }

  absl::StatusOr<std::vector<float>> LoadVector(VectorRole role, int layer) const override {
    const bool is_bias = role == VectorRole::kRouterBias;
    const uint64_t seed = HashOfCounter(
        kVectorSeed, static_cast<uint64_t>(role) << 48 | static_cast<uint64_t>(layer));
    std::vector<float> values(is_bias ? config_.num_experts : config_.hidden_size);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = ValueOf(role, HashOfCounter(seed, i));
    }
    return values;
  }

  // A skew needs biases, whether the model has them or not.
  bool has_router_bias() const override {
    return config_.has_router_bias || options_.router_skew > 0;
  }
  std::string identity() const override {
    return fmt::format("dummy router_skew={} unrounded={} layers={} hidden={} vocab={} format={}",
                       options_.router_skew,
                       backend_->rounding() == kernels::WeightRounding::kUnrounded,
                       config_.num_layers, config_.hidden_size, config_.vocab_size,
                       static_cast<int>(config_.expert_quantization));
  }

 private:
  float ValueOf(VectorRole role, uint64_t bits) const {
    switch (role) {
      case VectorRole::kInputNorm:
      case VectorRole::kPostAttentionNorm:
        return UniformFromHalfToThreeHalves(bits);
      case VectorRole::kFinalNorm: {
        // The signs keep a tied head from answering each token with itself.
        const double gain = kLogitDeviation / std::sqrt(config_.hidden_size);
        return static_cast<float>((bits & 1) != 0 ? -gain : gain) *
               UniformFromHalfToThreeHalves(bits);
      }
      case VectorRole::kRouterBias:
        // A softmax over the experts differs by about its mean from one expert to another.
        return static_cast<float>(options_.router_skew / config_.num_experts) *
               UniformFromMinusOneToOne(bits);
    }
    CHECK(false, "role={}", static_cast<int>(role));
  }

  const ModelConfig config_;
  const DummyWeightOptions options_;
  kernels::Backend* const backend_;
  const int rank_;
  const int world_size_;
};

}  // namespace

DummyMatrix DescribeDummyMatrix(const ModelConfig& config, const MatrixRef& ref, int rank,
                                int world_size) {
  const Layout layout = CanonicalLayout(config);
  const LogicalMatrix described = DescribeMatrix(layout, config, ref);
  const StoredMatrix& stored = described.parts.front().stored;
  const bool is_tied_head = ref.role == MatrixRole::kHead && layout.head_is_tied;
  DummyMatrix matrix;
  matrix.format = FormatOf(stored.format, ref.role);
  matrix.seed = SeedOf(is_tied_head ? MatrixRef{MatrixRole::kEmbedding} : ref);
  matrix.transposed = is_tied_head;
  // What an embedding of this size gives, its products with the normed hidden state undo in the
  // final norm's gain.
  const bool is_table = ref.role == MatrixRole::kEmbedding || ref.role == MatrixRole::kHead;
  matrix.deviation = is_table ? 1.0f : 1.0f / std::sqrt(static_cast<float>(stored.k));
  CHECK(described.parts.size() <= DummyMatrix::kMaxRanges, "{} parts", described.parts.size());
  for (const MatrixPart& part : described.parts) {
    const formats::MatrixSlice slice = SliceOf(part, described.split, rank, world_size);
    matrix.k = slice.num_rows();
    matrix.first_row = slice.k_begin;
    matrix.n += slice.num_columns();
    matrix.ranges[matrix.num_ranges++] = {slice.n_begin, slice.num_columns()};
  }
  return matrix;
}

std::unique_ptr<WeightSource> MakeDummySource(const ModelConfig& config,
                                              const DummyWeightOptions& options,
                                              kernels::Backend* backend, int rank, int world_size) {
  return std::make_unique<DummySource>(config, options, backend, rank, world_size);
}

int64_t CudaWeightBytes(const ModelConfig& config, int rank, int world_size) {
  int64_t bytes = 0;
  for (const MatrixRef& ref : AllMatrices(config)) {
    if (ref.role == MatrixRole::kHead && !config.tie_word_embeddings_is_set) {
      continue;  // on no account more than there will be
    }
    bytes += BytesOfDummy(DescribeDummyMatrix(config, ref, rank, world_size), ref.role);
  }
  return bytes;
}

}  // namespace wintserve
