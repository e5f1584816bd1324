#include "kernels/cuda/attention/attention_test_util.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/check.h"
#include "kernels/formats/bf16.h"
#include "kernels/plan/half.h"

namespace wintserve::kernels::cuda {

using plan::kKvTileTokens;
using plan::KvCacheKind;
using plan::KvPart;

namespace {

constexpr int64_t kAlignment = 256;
constexpr int kNumLayers = 3;  // of a block; the middle one is used
constexpr int kLayer = 1;
constexpr int kSpareBlocks = 2;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

AlignedBytes::AlignedBytes(int64_t size_bytes, unsigned char fill) : size_(size_bytes) {
  const int64_t rounded = CeilDiv(std::max<int64_t>(size_bytes, 1), kAlignment) * kAlignment;
  bytes_.reset(static_cast<unsigned char*>(std::aligned_alloc(kAlignment, rounded)));
  CHECK(bytes_ != nullptr, "{} bytes", size_bytes);
  std::memset(bytes_.get(), fill, rounded);
}

void AlignedBytes::Freer::operator()(unsigned char* bytes) const { std::free(bytes); }

AttentionProblem::AttentionProblem(const TestShape& shape,
                                   const std::vector<TestSequence>& sequences)
    : shape_(shape), sequences_(sequences) {
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const TestSequence& s = sequences_[i];
    first_token_.push_back(num_tokens_);
    position_.push_back(s.position);
    length_.push_back(s.length);
    token_sequence_.insert(token_sequence_.end(), s.length, static_cast<int32_t>(i));
    num_tokens_ += s.length;
    if (s.length == 0) continue;
    block_table_stride_ =
        std::max(block_table_stride_, CeilDiv(s.position + s.length, kKvTileTokens) + 1);
  }
  // Rows behind the last sequence's, as a captured launch has them.
  num_tokens_ += kSpareTokens;
  token_sequence_.insert(token_sequence_.end(), kSpareTokens, -1);
  constexpr int32_t kNoBlock = 0x7FFFFF00;
  block_tables_.assign(sequences_.size() * block_table_stride_, kNoBlock);
}

AttentionProblem::AttentionProblem(const TestShape& shape,
                                   const std::vector<TestSequence>& sequences, std::mt19937* rng)
    : AttentionProblem(shape, sequences) {
  int64_t num_blocks = kSpareBlocks;
  for (const TestSequence& s : sequences_) {
    if (s.length > 0) num_blocks += CeilDiv(s.position + s.length, kKvTileTokens);
  }
  std::vector<int32_t> ids(num_blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), *rng);
  size_t next = 0;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (sequences_[i].length == 0) continue;
    const int64_t blocks = CeilDiv(position_[i] + length_[i], kKvTileTokens);
    for (int64_t b = 0; b < blocks; ++b) block_tables_[i * block_table_stride_ + b] = ids[next++];
  }
  pool_ = AlignedBytes(num_blocks * block_stride_bytes());
  qkv_ = AlignedBytes(num_tokens_ * qkv_stride() * 4);
  for (size_t i = 0; i < sequences_.size(); ++i) FillSequence(static_cast<int>(i), rng);
}

void AttentionProblem::FillSequence(int sequence, std::mt19937* rng) {
  const int dim = shape_.head_dim;
  std::normal_distribution<float> normal;
  for (int32_t t = 0; t < length_[sequence]; ++t) {
    float* row = QkvRow(first_token_[sequence] + t);
    for (int i = 0; i < shape_.num_heads * dim; ++i) row[i] = 1.5f * normal(*rng);
  }
  const int32_t num_keys = length_[sequence] == 0 ? 0 : position_[sequence] + length_[sequence];
  for (int32_t token = 0; token < num_keys; ++token) {
    const int64_t block = block_tables_[sequence * block_table_stride_ + token / kKvTileTokens];
    for (int head = 0; head < 2 * shape_.num_kv_heads; ++head) {
      const bool is_value = head >= shape_.num_kv_heads;
      unsigned char* tile =
          pool_.data() + block * block_stride_bytes() + layer_offset_bytes() +
          plan::KvTileOffset(shape_.kind, shape_.num_kv_heads, dim,
                             is_value ? KvPart::kValue : KvPart::kKey, head % shape_.num_kv_heads);
      const int slot = token % kKvTileTokens;
      if (shape_.kind == KvCacheKind::kInt8) {
        const uint16_t scale =
            plan::FloatToHalfRoundUp(std::exp2(normal(*rng)) * (is_value ? 0.02f : 0.03f));
        std::memcpy(tile + plan::KvScaleOffset(dim, slot), &scale, sizeof(scale));
      }
      for (int d = 0; d < dim; ++d) {
        unsigned char* to = tile + plan::KvElementOffset(shape_.kind, dim, slot, d);
        if (shape_.kind == KvCacheKind::kInt8) {
          const auto code =
              static_cast<int8_t>(std::uniform_int_distribution<int>(-127, 127)(*rng));
          std::memcpy(to, &code, sizeof(code));
        } else {
          // Values have a common part, or attention over many keys would only measure noise.
          const uint16_t bits = formats::FloatToBfloat16(normal(*rng) + (is_value ? 0.5f : 0.0f));
          std::memcpy(to, &bits, sizeof(bits));
        }
      }
    }
  }
}

int32_t AttentionProblem::max_length() const {
  return *std::max_element(length_.begin(), length_.end());
}

int64_t AttentionProblem::block_stride_bytes() const {
  return plan::KvBlockBytes(shape_.kind, kNumLayers, shape_.num_kv_heads, shape_.head_dim);
}
int64_t AttentionProblem::layer_offset_bytes() const {
  return kLayer * plan::KvLayerBytes(shape_.kind, shape_.num_kv_heads, shape_.head_dim);
}

SequenceArrays AttentionProblem::arrays() const {
  return {.num_sequences = static_cast<int32_t>(sequences_.size()),
          .num_tokens = num_tokens_,
          .first_token = first_token_.data(),
          .position = position_.data(),
          .length = length_.data(),
          .token_sequence = token_sequence_.data(),
          .block_tables = block_tables_.data(),
          .block_table_stride = block_table_stride_};
}

AttentionProblem AttentionProblem::Part(int sequence, int32_t first_token, int32_t length) const {
  CHECK(first_token + length <= length_[sequence]);
  AttentionProblem part(shape_, {{position_[sequence] + first_token, length}});
  const int32_t* table = &block_tables_[sequence * block_table_stride_];
  std::copy(table, table + part.block_table_stride_ - 1, part.block_tables_.begin());
  part.pool_ = AlignedBytes(pool_.size());
  std::memcpy(part.pool_.data(), pool_.data(), pool_.size());
  part.qkv_ = AlignedBytes(part.num_tokens_ * qkv_stride() * 4);
  std::memcpy(part.qkv_.data(),
              qkv_.data() + (first_token_[sequence] + first_token) * qkv_stride() * 4,
              length * qkv_stride() * 4);
  return part;
}

void AttentionProblem::FillNewKeysAndValues(std::mt19937* rng) {
  std::normal_distribution<float> normal;
  const int dim = shape_.head_dim;
  for (int32_t token = 0; token < num_tokens_ - kSpareTokens; ++token) {
    for (int head = 0; head < 2 * shape_.num_kv_heads; ++head) {
      float* values = QkvRow(token) + (shape_.num_heads + head) * dim;
      // From what a scale cannot represent to what it cannot reach.
      const float size = std::exp2(std::uniform_real_distribution<float>(-40.0f, 26.0f)(*rng));
      const bool is_zero = (*rng)() % 8 == 0;
      for (int i = 0; i < dim; ++i) values[i] = is_zero ? 0.0f : size * normal(*rng);
    }
  }
}

std::vector<float> AttentionProblem::RandomCosSin(std::mt19937* rng) const {
  std::uniform_real_distribution<float> angle(-3.1f, 3.1f);
  const int half = shape_.head_dim / 2;
  std::vector<float> cos_sin(int64_t{num_tokens_} * shape_.head_dim);
  for (int32_t token = 0; token < num_tokens_; ++token) {
    for (int j = 0; j < half; ++j) {
      const float a = angle(*rng);
      cos_sin[int64_t{token} * shape_.head_dim + j] = std::cos(a);
      cos_sin[int64_t{token} * shape_.head_dim + half + j] = std::sin(a);
    }
  }
  return cos_sin;
}

namespace {

// As kernels/cpu rotates: every product is rounded.
std::vector<float> Rotated(const float* head, const float* cos_sin, int head_dim) {
  std::vector<float> rotated(head_dim);
  for (int j = 0; j < head_dim / 2; ++j) {
    const float cosine = cos_sin[j];
    const float sine = cos_sin[head_dim / 2 + j];
    const volatile float products[4] = {head[2 * j] * cosine, head[2 * j + 1] * sine,
                                        head[2 * j + 1] * cosine, head[2 * j] * sine};
    rotated[2 * j] = products[0] - products[1];
    rotated[2 * j + 1] = products[2] + products[3];
  }
  return rotated;
}

// One row of the 8-bit cache: the scale is the least half that keeps all codes within 127.
void Quantize(const std::vector<float>& values, std::vector<int8_t>* codes, uint16_t* scale) {
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::fabs(value));
  *scale = plan::FloatToHalfRoundUp(largest / 127.0f);
  const float inverse = *scale == 0 ? 0.0f : 1.0f / plan::HalfToFloat(*scale);
  for (const float value : values) {
    const float code = std::rint(std::clamp(value * inverse, -127.0f, 127.0f));
    codes->push_back(static_cast<int8_t>(code));
    // Half a step, unless the value is beyond what a half can scale or below what it resolves.
    const double size = plan::HalfToFloat(*scale);
    const double limit = 127.0 * 65504.0;
    if (largest <= limit) {
      EXPECT_LE(std::fabs(code * size - value), 0.5001 * size) << value << " of " << largest;
    }
  }
}

}  // namespace

AlignedBytes AttentionProblem::PoolWithNewTokens(const std::vector<float>& cos_sin) const {
  AlignedBytes pool(pool_.size());
  std::memcpy(pool.data(), pool_.data(), pool_.size());
  const int dim = shape_.head_dim;
  for (int32_t token = 0; token < num_tokens_ - kSpareTokens; ++token) {
    const int32_t sequence = token_sequence_[token];
    const int32_t position = position_[sequence] + token - first_token_[sequence];
    const int64_t block = block_tables_[sequence * block_table_stride_ + position / kKvTileTokens];
    const int slot = position % kKvTileTokens;
    for (int head = 0; head < 2 * shape_.num_kv_heads; ++head) {
      const bool is_value = head >= shape_.num_kv_heads;
      const float* from = QkvRow(token) + (shape_.num_heads + head) * dim;
      const std::vector<float> values = is_value
                                            ? std::vector<float>(from, from + dim)
                                            : Rotated(from, &cos_sin[int64_t{token} * dim], dim);
      unsigned char* tile =
          pool.data() + block * block_stride_bytes() + layer_offset_bytes() +
          plan::KvTileOffset(shape_.kind, shape_.num_kv_heads, dim,
                             is_value ? KvPart::kValue : KvPart::kKey, head % shape_.num_kv_heads);
      std::vector<int8_t> codes;
      if (shape_.kind == KvCacheKind::kInt8) {
        uint16_t scale;
        Quantize(values, &codes, &scale);
        std::memcpy(tile + plan::KvScaleOffset(dim, slot), &scale, sizeof(scale));
      }
      for (int i = 0; i < dim; ++i) {
        unsigned char* to = tile + plan::KvElementOffset(shape_.kind, dim, slot, i);
        const uint16_t bits = formats::FloatToBfloat16(values[i]);
        if (shape_.kind == KvCacheKind::kInt8) std::memcpy(to, &codes[i], 1);
        if (shape_.kind == KvCacheKind::kBfloat16) std::memcpy(to, &bits, 2);
      }
    }
  }
  return pool;
}

AlignedBytes AttentionProblem::QkvWithRotatedQueries(const std::vector<float>& cos_sin) const {
  AlignedBytes qkv(qkv_.size());
  std::memcpy(qkv.data(), qkv_.data(), qkv_.size());
  const int dim = shape_.head_dim;
  for (int32_t token = 0; token < num_tokens_ - kSpareTokens; ++token) {
    float* row = reinterpret_cast<float*>(qkv.data()) + token * qkv_stride();
    for (int head = 0; head < shape_.num_heads; ++head) {
      const auto rotated = Rotated(row + head * dim, &cos_sin[int64_t{token} * dim], dim);
      std::copy(rotated.begin(), rotated.end(), row + head * dim);
    }
  }
  return qkv;
}

void AttentionProblem::ExpectPool(const AlignedBytes& expected, const AlignedBytes& pool) const {
  for (int64_t i = 0; i < expected.size(); ++i) {
    if (expected.data()[i] == pool.data()[i]) continue;
    const int64_t in_block = i % block_stride_bytes();
    const int64_t layer_bytes =
        plan::KvLayerBytes(shape_.kind, shape_.num_kv_heads, shape_.head_dim);
    const int64_t in_layer = in_block % layer_bytes;
    const int64_t tile_bytes = plan::KvTileBytes(shape_.kind, shape_.head_dim);
    ADD_FAILURE() << TestName(shape_) << " block " << i / block_stride_bytes() << " layer "
                  << in_block / layer_bytes << " tile " << in_layer / tile_bytes << " byte "
                  << in_layer % tile_bytes << ": got " << int{pool.data()[i]} << ", want "
                  << int{expected.data()[i]};
    return;
  }
}

void AttentionProblem::ExpectQkv(const AlignedBytes& expected, const AlignedBytes& qkv) const {
  for (int64_t i = 0; i < expected.size() / 4; ++i) {
    if (std::memcmp(expected.data() + 4 * i, qkv.data() + 4 * i, 4) == 0) continue;
    ADD_FAILURE() << TestName(shape_) << " token " << i / qkv_stride() << " column "
                  << i % qkv_stride() << ": got " << reinterpret_cast<const float*>(qkv.data())[i]
                  << ", want " << reinterpret_cast<const float*>(expected.data())[i];
    return;
  }
}

AlignedBytes AttentionProblem::PoisonedOut() const {
  return AlignedBytes(num_tokens_ * out_stride() * 4);
}

float AttentionProblem::Stored(int sequence, KvPart part, int32_t token, int kv_head,
                               int dim) const {
  const int64_t block = block_tables_[sequence * block_table_stride_ + token / kKvTileTokens];
  const unsigned char* tile =
      pool_.data() + block * block_stride_bytes() + layer_offset_bytes() +
      plan::KvTileOffset(shape_.kind, shape_.num_kv_heads, shape_.head_dim, part, kv_head);
  const int slot = token % kKvTileTokens;
  const unsigned char* from = tile + plan::KvElementOffset(shape_.kind, shape_.head_dim, slot, dim);
  uint16_t bits;
  if (shape_.kind == KvCacheKind::kBfloat16) {
    std::memcpy(&bits, from, sizeof(bits));
    return formats::Bfloat16ToFloat(bits);
  }
  std::memcpy(&bits, tile + plan::KvScaleOffset(shape_.head_dim, slot), sizeof(bits));
  return static_cast<float>(static_cast<int8_t>(*from)) * plan::HalfToFloat(bits);
}

const float* AttentionProblem::Query(int sequence, int32_t token, int head) const {
  return QkvRow(first_token_[sequence] + token) + head * shape_.head_dim;
}

const float* AttentionProblem::OutRow(const AlignedBytes& out, int sequence, int32_t token) const {
  return reinterpret_cast<const float*>(out.data()) +
         (first_token_[sequence] + token) * out_stride();
}

std::string AttentionProblem::Describe(int sequence, int32_t token, int head) const {
  return fmt::format(
      "{} {} heads / {} KV heads x {}: sequence {} of {} (position {}, length {}) "
      "token {} head {}",
      shape_.kind == KvCacheKind::kInt8 ? "int8" : "bfloat16", shape_.num_heads,
      shape_.num_kv_heads, shape_.head_dim, sequence, sequences_.size(), position_[sequence],
      length_[sequence], token, head);
}

namespace {

// Keys or values of one KV head as float32, [num_keys, head_dim].
std::vector<float> StoredHead(const AttentionProblem& problem, int sequence, KvPart part,
                              int32_t num_keys, int kv_head) {
  const int dim = problem.shape().head_dim;
  std::vector<float> head(int64_t{num_keys} * dim);
  for (int32_t j = 0; j < num_keys; ++j) {
    for (int i = 0; i < dim; ++i) {
      head[int64_t{j} * dim + i] = problem.Stored(sequence, part, j, kv_head, i);
    }
  }
  return head;
}

// The reference for one head from the stored keys and values of its KV head.
AttentionReference AttendHead(const TestShape& shape, const float* q, const float* keys,
                              const float* values, int32_t num_keys) {
  const int dim = shape.head_dim;
  const double scale = std::log2(std::exp(1.0)) / std::sqrt(dim);  // the kernel's unit is log2
  // FastDeploy's kernels multiply the codes of an 8-bit cache by their scale in bfloat16.
  const auto as_fast_deploy = [](float stored) { return formats::RoundToBfloat16(stored); };
  std::vector<float> rounded_q(dim);
  for (int i = 0; i < dim; ++i) rounded_q[i] = formats::RoundToBfloat16(q[i]);

  std::vector<double> scores(num_keys), rounded_scores(num_keys);
  double score_error = 0;
  for (int32_t j = 0; j < num_keys; ++j) {
    const float* key = keys + int64_t{j} * dim;
    double magnitudes = 0;
    for (int i = 0; i < dim; ++i) {
      scores[j] += scale * q[i] * key[i];
      rounded_scores[j] += scale * rounded_q[i] * as_fast_deploy(key[i]);
      magnitudes += scale * std::fabs(double{q[i]} * key[i]);
    }
    // Two limbs keep q to 2^-16. Each of the 2 * dim terms of the product may cut off a last bit of
    // the sum, which the tensor cores do instead of rounding; then come the scale of q and, in the
    // 8-bit cache, the key's.
    score_error = std::max(score_error, magnitudes * (0x1p-16 + (2 * dim + 2) * 0x1p-23));
  }
  const double maximum = *std::max_element(scores.begin(), scores.end());
  const double rounded_maximum = *std::max_element(rounded_scores.begin(), rounded_scores.end());
  const double minimum = *std::min_element(scores.begin(), scores.end());

  // Of a weight, relative to the others: its score, the rounding of its distance from the maximum,
  // one exponential for itself and one for each merge and each change of the maximum, their
  // products; then the sum of the weights.
  const int32_t merges = plan::NumSegments(num_keys) + kKvTileTokens;
  const double exponent_error =
      std::log(2.0) * (score_error + 0x1p-24 * (maximum - minimum + score_error));
  const double summands = std::min(num_keys, plan::kMaxSegmentTokens) + 2.0 * merges;
  const double weight_error =
      std::expm1(exponent_error) + merges * (0x1p-22 + 0x1p-24) + summands * 0x1p-23;
  const double bfloat16_error = 0x1p-8 + 0x1p-24;  // of a weight times, in the 8-bit cache, a scale

  AttentionReference reference;
  reference.value.assign(dim, 0);
  reference.error.assign(dim, 0);
  reference.fast_deploy.assign(dim, 0);
  double sum = 0, rounded_sum = 0;
  std::vector<double> magnitudes(dim);
  for (int32_t j = 0; j < num_keys; ++j) {
    const double weight = std::exp2(scores[j] - maximum);
    const double rounded_weight = std::exp2(rounded_scores[j] - rounded_maximum);
    const double bfloat16_weight = formats::RoundToBfloat16(static_cast<float>(rounded_weight));
    sum += weight;
    rounded_sum += rounded_weight;
    for (int i = 0; i < dim; ++i) {
      const double value = values[int64_t{j} * dim + i];
      reference.value[i] += weight * value;
      reference.error[i] += weight * std::fabs(value);
      reference.fast_deploy[i] += bfloat16_weight * as_fast_deploy(values[int64_t{j} * dim + i]);
      magnitudes[i] += std::fabs(value);
    }
  }
  for (int i = 0; i < dim; ++i) {
    reference.value[i] /= sum;
    reference.fast_deploy[i] /= rounded_sum;
    // Numerator and denominator each err by weight_error.
    reference.error[i] *= (2.02 * weight_error + 1.01 * bfloat16_error) / sum;
    // Tensor cores and ex2 flush float32 results below the smallest normal one to zero: the result,
    // or a weight before it is multiplied by a value.
    reference.error[i] += std::numeric_limits<float>::min() * (1 + (1 + merges) * magnitudes[i]);
  }
  return reference;
}

}  // namespace

AttentionReference Attend(const AttentionProblem& problem, int sequence, int32_t token, int head) {
  const TestShape& shape = problem.shape();
  const int kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const int32_t num_keys = problem.sequences()[sequence].position + token + 1;
  const auto keys = StoredHead(problem, sequence, KvPart::kKey, num_keys, kv_head);
  const auto values = StoredHead(problem, sequence, KvPart::kValue, num_keys, kv_head);
  return AttendHead(shape, problem.Query(sequence, token, head), keys.data(), values.data(),
                    num_keys);
}

void CheckOut(const AttentionProblem& problem, const AlignedBytes& out, int32_t token_stride,
              SquaredErrors* errors) {
  const TestShape& shape = problem.shape();
  const int group = shape.num_heads / shape.num_kv_heads;
  const auto is_poison = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits == 0xFFFFFFFF;
  };
  int num_failures = 0;
  for (size_t s = 0; s < problem.sequences().size(); ++s) {
    const auto sequence = static_cast<int>(s);
    const auto [position, length] = problem.sequences()[s];
    for (int kv_head = 0; kv_head < shape.num_kv_heads && length > 0; ++kv_head) {
      const auto keys = StoredHead(problem, sequence, KvPart::kKey, position + length, kv_head);
      const auto values = StoredHead(problem, sequence, KvPart::kValue, position + length, kv_head);
      for (int32_t token = (length - 1) % token_stride; token < length; token += token_stride) {
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          const AttentionReference reference =
              AttendHead(shape, problem.Query(sequence, token, head), keys.data(), values.data(),
                         position + token + 1);
          const float* got = problem.OutRow(out, sequence, token) + head * shape.head_dim;
          for (int i = 0; i < shape.head_dim; ++i) {
            const double error = std::fabs(got[i] - reference.value[i]);
            if (!(error <= reference.error[i]) && ++num_failures <= 10) {
              ADD_FAILURE() << problem.Describe(sequence, token, head) << " dim " << i << ": got "
                            << got[i] << ", want " << reference.value[i] << " within "
                            << reference.error[i];
            }
            const double fast_deploy_error = reference.fast_deploy[i] - reference.value[i];
            errors->ours += error * error;
            errors->fast_deploy += fast_deploy_error * fast_deploy_error;
            ++errors->count;
          }
        }
      }
    }
    for (int32_t token = 0; token < length; ++token) {
      const float* row = problem.OutRow(out, sequence, token);
      for (int64_t c = problem.out_columns(); c < problem.out_stride(); ++c) {
        EXPECT_TRUE(is_poison(row[c])) << problem.Describe(sequence, token, 0) << " column " << c;
      }
    }
  }
  EXPECT_LE(num_failures, 10) << "results out of bounds, of which the first are shown";
  // Places that are no sequence's lie behind the last.
  const auto* floats = reinterpret_cast<const float*>(out.data());
  const int32_t used = problem.num_tokens() - AttentionProblem::kSpareTokens;
  for (int64_t i = used * problem.out_stride(); i < out.size() / 4; ++i) {
    ASSERT_TRUE(is_poison(floats[i])) << "float " << i << " belongs to no token";
  }
}

void ExpectNoWorseThanFastDeploy(const SquaredErrors& errors) {
  const auto root_mean_square = [&](double sum) {
    return std::sqrt(sum / static_cast<double>(errors.count));
  };
  const double ours = root_mean_square(errors.ours);
  const double fast_deploy = root_mean_square(errors.fast_deploy);
  EXPECT_LE(ours, fast_deploy) << "over " << errors.count << " results";
  testing::Test::RecordProperty("rms_error", fmt::format("{:.3g}", ours));
  testing::Test::RecordProperty("rms_error_fast_deploy", fmt::format("{:.3g}", fast_deploy));
}

void ExpectExact(const AttentionRunner& run, const AttentionProblem& problem,
                 int32_t token_stride) {
  SquaredErrors errors;
  CheckOut(problem, run(problem), token_stride, &errors);
  ExpectNoWorseThanFastDeploy(errors);
}

namespace {

bool RowsDiffer(const AttentionProblem& problem, const float* expected, const float* row,
                int sequence, int32_t token, const std::string& how) {
  for (int64_t c = 0; c < problem.out_columns(); ++c) {
    if (std::memcmp(expected + c, row + c, sizeof(float)) == 0) continue;
    const int dim = problem.shape().head_dim;
    ADD_FAILURE() << problem.Describe(sequence, token, static_cast<int>(c / dim)) << " dim "
                  << c % dim << ": " << expected[c] << ", but " << row[c] << " when " << how;
    return true;
  }
  return false;
}

}  // namespace

void ExpectSameBits(const AttentionProblem& problem, const AlignedBytes& out, int sequence,
                    int32_t first_token, const AttentionProblem& part,
                    const AlignedBytes& part_out) {
  const int32_t length = part.sequences()[0].length;
  for (int32_t token = 0; token < length; ++token) {
    if (RowsDiffer(problem, problem.OutRow(out, sequence, first_token + token),
                   part.OutRow(part_out, 0, token), sequence, first_token + token,
                   fmt::format("in a chunk of {} from token {}", length, first_token))) {
      return;
    }
  }
}

void ExpectSameRows(const AttentionProblem& problem, const AlignedBytes& expected,
                    const AlignedBytes& out, int sequence, const std::string& how) {
  for (int32_t token = 0; token < problem.sequences()[sequence].length; ++token) {
    if (RowsDiffer(problem, problem.OutRow(expected, sequence, token),
                   problem.OutRow(out, sequence, token), sequence, token, how)) {
      return;
    }
  }
}

std::string TestName(const TestShape& shape) {
  return fmt::format("{}Heads{}On{}Of{}", shape.kind == KvCacheKind::kInt8 ? "Int8" : "Bfloat16",
                     shape.num_heads, shape.num_kv_heads, shape.head_dim);
}

}  // namespace wintserve::kernels::cuda
