// Draws the next token of a sequence from its logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/token_counts.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cpu {

// What the fields do, and in which order, is written in kernels/sampling/definition.h. A field left
// alone does nothing.
struct SampleRequest {
  float temperature = 1.0f;  // >= 0; 0 is greedy and needs no random number
  float top_p = 1.0f;        // (0, 1]; 1 keeps all
  int32_t top_k = 0;         // >= 0; 0 keeps all
  int64_t seed = 0;
  uint32_t position = 0;  // of the drawn token in its sequence
  uint32_t choice_index = 0;
  // Ids that must not be drawn, in rising order, each once, none negative; those that are no ids of
  // the logits do not matter. If they are all that there is, they count for nothing.
  std::span<const int32_t> masked_ids = {};
  float min_p = 0.0f;  // [0, 1]; 0 keeps all
  // Each id once, none negative; those that are no ids of the logits do not matter.
  std::span<const sampling::LogitBias> logit_bias = {};
  sampling::Penalties penalties = {};
  std::span<const TokenOccurrence> occurrences = {};  // of the sequence; only penalties read them
};

// Uniform in [0, 1), a multiple of 2^-24: see sampling::UniformBits.
float UniformDraw(int64_t seed, uint32_t position, uint32_t choice_index);

// Owns scratch memory that grows to the largest vocabulary seen.
// Threading: thread-compatible. The result depends on the arguments only, not on earlier calls.
class Sampler {
 public:
  // logits [vocabulary]: ids at and above logits.size() do not take part.
  // INVALID_ARGUMENT: a logit is NaN or infinite (the message names the id; masked ones count), or
  // logits is empty.
  // REQUIRES: a request in the ranges above and of sampling/definition.h; at most
  // sampling::kMaxVocabulary logits.
  absl::StatusOr<int32_t> Sample(std::span<const float> logits, const SampleRequest& request);

 private:
  // The logits after bias, penalties and mask, where masked ids have minus infinity.
  std::span<const float> Process(std::span<const float> logits, const SampleRequest& request,
                                 size_t num_masked);
  int32_t Draw(std::span<const float> values, float maximum, size_t num_unmasked,
               const SampleRequest& request);

  // Nothing is cut: by rising id.
  int32_t DrawFromAll(uint32_t uniform_bits);

  // In the order of falling logits. candidates_ grow by bands until they hold the mass that is
  // asked for, because sorting the vocabulary would cost more than everything else together.
  int32_t DrawFromTopK(std::span<const float> values, float maximum, const SampleRequest& request,
                       uint32_t uniform_bits);
  int32_t DrawFromBands(std::span<const float> values, float maximum, const SampleRequest& request,
                        uint32_t uniform_bits);
  void AppendBand(std::span<const float> values, float low, float high);
  // The first candidate whose running mass is at least `mass`.
  size_t FirstWith(uint64_t mass) const;

  std::vector<float> processed_;  // logits
  std::vector<float> weights_;    // by id
  std::vector<uint64_t> masses_;  // of blocks of weights_
  std::vector<sampling::Candidate> candidates_;
  std::vector<uint64_t> running_masses_;  // of candidates_, each with all before it
};

}  // namespace wintserve::kernels::cpu
