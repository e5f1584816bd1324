// Shared by the tests of attention on the emulated and on the real GPU: random batches over a paged
// cache full of NaN, and what their results should be in float64.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention/attention_params.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

// Memory aligned to 256 bytes, as device memory is. Full of NaNs in every format at first.
class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t size_bytes, unsigned char fill = 0xFF);
  unsigned char* data() const { return bytes_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Freer {
    void operator()(unsigned char* bytes) const;
  };
  std::unique_ptr<unsigned char, Freer> bytes_;
  int64_t size_;
};

struct TestShape {
  plan::KvCacheKind kind = plan::KvCacheKind::kBfloat16;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
};

struct TestSequence {
  int32_t position = 0;
  int32_t length = 0;  // 0: an unused place of the batch
};

// A batch with keys and values in the cache: in every block, outside the sequences' tokens and the
// one layer, lie NaNs; block tables are shuffled and go on in ids that no pool has.
//
// Sequences take the batch's tokens in their order; kSpareTokens at the end belong to none.
class AttentionProblem {
 public:
  static constexpr int32_t kSpareTokens = 3;

  AttentionProblem(const TestShape& shape, const std::vector<TestSequence>& sequences,
                   std::mt19937* rng);

  const TestShape& shape() const { return shape_; }
  const std::vector<TestSequence>& sequences() const { return sequences_; }
  int32_t num_tokens() const { return num_tokens_; }
  int32_t max_length() const;
  int64_t out_columns() const { return int64_t{shape_.num_heads} * shape_.head_dim; }
  int64_t out_stride() const { return out_columns() + 16; }
  int64_t qkv_stride() const {
    return (shape_.num_heads + 2 * shape_.num_kv_heads) * int64_t{shape_.head_dim} + 16;
  }
  int64_t block_stride_bytes() const;
  int64_t layer_offset_bytes() const;

  // Host memory; a test on a GPU copies it. The pointers stay valid as long as the problem.
  SequenceArrays arrays() const;
  const AlignedBytes& pool() const { return pool_; }
  const AlignedBytes& qkv() const { return qkv_; }  // q is random, k and v are NaN at first
  // One sequence alone, or some tokens of it, with the same q, keys and values.
  AttentionProblem Part(int sequence, int32_t first_token, int32_t length) const;

  // Fills k and v of every token in qkv, some of them large, some zero.
  void FillNewKeysAndValues(std::mt19937* rng);
  // The pool once k and v of qkv, with k rotated by cos_sin [num_tokens, head_dim], are in it.
  AlignedBytes PoolWithNewTokens(const std::vector<float>& cos_sin) const;
  // qkv once its q are rotated.
  AlignedBytes QkvWithRotatedQueries(const std::vector<float>& cos_sin) const;
  std::vector<float> RandomCosSin(std::mt19937* rng) const;
  // Expect the same bytes; name the place of the first that differs.
  void ExpectPool(const AlignedBytes& expected, const AlignedBytes& pool) const;
  void ExpectQkv(const AlignedBytes& expected, const AlignedBytes& qkv) const;

  // A result of NaNs to be written into, [num_tokens, out_stride].
  AlignedBytes PoisonedOut() const;

  // Key or value `dim` of a token as the cache holds it.
  float Stored(int sequence, plan::KvPart part, int32_t token, int kv_head, int dim) const;
  const float* Query(int sequence, int32_t token, int head) const;
  const float* OutRow(const AlignedBytes& out, int sequence, int32_t token) const;
  // "sequence 1 (position 63, length 2) token 0 head 5"
  std::string Describe(int sequence, int32_t token, int head) const;

 private:
  AttentionProblem(const TestShape& shape, const std::vector<TestSequence>& sequences);
  float* QkvRow(int32_t token) const {
    return reinterpret_cast<float*>(qkv_.data()) + token * qkv_stride();
  }
  void FillSequence(int sequence, std::mt19937* rng);

  const TestShape shape_;
  const std::vector<TestSequence> sequences_;
  int32_t num_tokens_ = 0;
  int64_t block_table_stride_ = 0;
  std::vector<int32_t> first_token_, position_, length_, token_sequence_, block_tables_;
  AlignedBytes pool_{0};
  AlignedBytes qkv_{0};
};

// One head of one token. `error` bounds the kernel's distance from `value`: from the roundings it
// makes by design, not from trials.
struct AttentionReference {
  std::vector<double> value;
  std::vector<double> error;
  // With q, the softmax weights and the keys and values that an 8-bit cache stands for rounded to
  // bfloat16 and everything else exact, as FastDeploy's kernels round on the same cache.
  std::vector<double> fast_deploy;
};
AttentionReference Attend(const AttentionProblem& problem, int sequence, int32_t token, int head);

// Sums of squared errors, for comparing the roundings of two ways.
struct SquaredErrors {
  double ours = 0;
  double fast_deploy = 0;
  int64_t count = 0;
};

// Expects every checked result within its bound, every row behind the last column and every place
// that is no token's untouched. Checks every stride-th token of a sequence, the last one always.
void CheckOut(const AttentionProblem& problem, const AlignedBytes& out, int32_t token_stride,
              SquaredErrors* errors);

// Runs attention on a problem and returns what it made of PoisonedOut().
using AttentionRunner = std::function<AlignedBytes(const AttentionProblem&)>;

// Expects the error (root mean square) at or below that of FastDeploy's rounding.
void ExpectNoWorseThanFastDeploy(const SquaredErrors& errors);
// Both for one problem.
void ExpectExact(const AttentionRunner& run, const AttentionProblem& problem, int32_t token_stride);

// Expects that the rows of `part`, made by problem.Part(sequence, first_token, …), have the same
// bits as those of the problem.
void ExpectSameBits(const AttentionProblem& problem, const AlignedBytes& out, int sequence,
                    int32_t first_token, const AttentionProblem& part,
                    const AlignedBytes& part_out);

// Expects one sequence's rows to have the same bits in two results of the same problem.
void ExpectSameRows(const AttentionProblem& problem, const AlignedBytes& expected,
                    const AlignedBytes& out, int sequence, const std::string& how);

// "Int8Heads8On1Of128"
std::string TestName(const TestShape& shape);

}  // namespace wintserve::kernels::cuda
