// What it means to sample a token: the contract of every device's sampler, and the arithmetic that
// they share. The CPU's is kernels/cpu/sampling.h, CUDA's kernels/cuda/sampling/sampling.h.
//
// A draw is a pure function of the row's logits, the request and the history of its sequence: it
// depends on no other row, no earlier draw, no number of threads. For the same float32 logits every
// device draws the same id: each step below either rounds one number in a stated way or adds whole
// numbers, whose sum has no order.
//
// In this order (FastDeploy's and vLLM's), for ids 0 … vocabulary - 1. Ids at and beyond the
// vocabulary that is sampled (the tokenizer's size) do not exist; their logits are not read.
//
//  1. Every logit must be finite. A NaN or an infinity, wherever it stands, is an error that names
//     the lowest such id. So a mask is a list of ids, not a logit of minus infinity.
//  2. Log-probabilities (of the drawn token, or of a given one, and of the n most probable) are
//     those of the logits as they are here: nothing below changes them. See LogProbability. A given
//     id beyond the vocabulary has minus infinity, and the rank after all others.
//  3. Logit bias: logit += bias, for the ids that have one. A bias of minus infinity (kBanned)
//     makes float32's lowest number of the logit, whatever step 4 says.
//  4. Penalties, for ids that occur in the sequence: see ProcessedLogit. Repetition counts prompt
//     and generated tokens, presence and frequency generated ones only.
//  5. Masked ids (stop ids before min_tokens, bad words) drop out, as if the vocabulary did not
//     have them. If every id is masked, none is.
//  6. Temperature 0: the largest logit, the lowest id of equal ones. No random number; the steps
//     below do not matter.
//  7. Temperature and softmax: the weight of an id is exp of its scaled logit, which is
//     (logit - maximum) / temperature; its mass is the weight in units of kMassUnit. See
//     ScaledLogit, Weight, Mass. Ids below kMinScaledLogit, less than 2^-46 as likely as the most
//     probable one, drop out.
//  8. min_p: ids whose scaled logit is at least log(min_p) stay, see MinScaledLogit: those at least
//     min_p times as likely as the most probable one.
//  9. top_k: the first top_k ids of those left stay, in order of falling logit and, among equal
//     logits, rising id. This order decides from here on; it is that of the probabilities, without
//     the ties that rounding makes of them.
// 10. top_p: the fewest first ids stay whose mass is enough, see EnoughMass; at least one.
// 11. One draw by inverse CDF of what is left, see TargetMass: the first id at which the running
//     mass is more than the target. The CDF runs in the order of step 9, but by rising id when
//     the request cuts nothing: min_p 0, top_p 1, and a top_k of 0 or of at least the number of ids
//     that are not masked.
//
// Compile host code that includes this without contraction of a * b + c (-ffp-contract=off).
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/plan/host_device.h"
#include "kernels/sampling/philox.h"
#include "kernels/sampling/sampling_types.h"

namespace wintserve::kernels::sampling {

// Ids 0 … 2^17 - 1 of mass at most 2^46 each: no sum of masses overflows 63 bits.
inline constexpr int kMaxVocabulary = 1 << 17;
inline constexpr int kMassBits = 46;
inline constexpr double kMassUnit = 0x1p-46;  // a weight of 1 is 2^46 units

// float32 operations that are rounded one by one, on the device too, where nvcc would fuse them.
#if defined(__CUDA_ARCH__)
__device__ inline float Add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float Subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float Multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float Divide(float a, float b) { return __fdiv_rn(a, b); }
#else
inline float Add(float a, float b) { return a + b; }
inline float Subtract(float a, float b) { return a - b; }
inline float Multiply(float a, float b) { return a * b; }
inline float Divide(float a, float b) { return a / b; }
#endif

// Steps 3 and 4 for one id. Positive logits are divided by the repetition penalty, others
// multiplied, so that one above 1 always makes the token less likely. A result beyond float32's
// range becomes its largest or lowest number.
WINTSERVE_HOST_DEVICE inline float ProcessedLogit(float logit, float bias, Occurrence occurrence,
                                                  const Penalties& penalties) {
  float x = Add(logit, bias);
  if (occurrence != 0) {
    x = x < 0 ? Multiply(x, penalties.repetition) : Divide(x, penalties.repetition);
    const Occurrence count = occurrence & ~kInPrompt;
    if (count != 0) {
      x = Subtract(x, Multiply(static_cast<float>(count), penalties.frequency));
      x = Subtract(x, penalties.presence);
    }
  }
  return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

// Below it a weight is less than one unit of mass.
inline constexpr float kMinScaledLogit = -32.0f;

// The least scaled logit that min_p in [0, 1] leaves. Called on the host for every device: their
// logarithms differ.
inline float MinScaledLogit(float min_p) {
  if (min_p == 0) return kMinScaledLogit;
  const auto least = static_cast<float>(std::log(static_cast<double>(min_p)));
  return least < kMinScaledLogit ? kMinScaledLogit : least;
}

// At most 0; minus infinity if it leaves float32's range. Dividing, not multiplying by
// 1 / temperature: that may be infinite, and 0 * infinity is no weight.
// REQUIRES: temperature > 0, logit <= maximum.
WINTSERVE_HOST_DEVICE inline float ScaledLogit(float logit, float maximum, float temperature) {
  return Divide(Subtract(logit, maximum), temperature);
}

// exp(scaled_logit) within 2 ulp; 0 below min_scaled_logit. Not std::exp: this one has the same
// bits everywhere, and compilers vectorise it. To the last bit it is not monotonic, so what must be
// a range of the order compares scaled logits, not weights.
// REQUIRES: scaled_logit <= 0, min_scaled_logit >= kMinScaledLogit.
WINTSERVE_HOST_DEVICE inline float Weight(float scaled_logit, float min_scaled_logit) {
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
  const float x = scaled_logit < kMinScaledLogit ? kMinScaledLogit : scaled_logit;
  const float shifted = Add(Multiply(x, 1.44269504f), kRoundToInteger);
  const float n = Subtract(shifted, kRoundToInteger);
  // x - n * ln 2, in two parts.
  const float r = Add(Subtract(x, Multiply(n, 0.693359375f)), Multiply(n, 2.12194440e-4f));
  float series = 1.0f / 5040;
  series = Add(Multiply(series, r), 1.0f / 720);
  series = Add(Multiply(series, r), 1.0f / 120);
  series = Add(Multiply(series, r), 1.0f / 24);
  series = Add(Multiply(series, r), 1.0f / 6);
  series = Add(Multiply(series, r), 0.5f);
  series = Add(Multiply(series, r), 1.0f);
  series = Add(Multiply(series, r), 1.0f);
  const int32_t exponent =
      std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRoundToInteger);
  const float power = std::bit_cast<float>((exponent + 127) << 23);
  return scaled_logit < min_scaled_logit ? 0.0f : Multiply(series, power);
}

#if !defined(__CUDA_ARCH__)
// What ulp 2^-46 makes of a weight: the integer is the difference of the bits.
inline constexpr double kMassMagic = 0x1p6;
inline constexpr uint64_t kMassMagicBits = std::bit_cast<uint64_t>(kMassMagic);
#endif

// The weight in units of kMassUnit, rounded to the nearest, of two to the even one. 0 for a weight
// of 0 only: exp(kMinScaledLogit) is 0.89 units.
WINTSERVE_HOST_DEVICE inline uint64_t Mass(float weight) {
#if defined(__CUDA_ARCH__)
  return __float2ull_rn(weight * 0x1p46f);
#else
  return std::bit_cast<uint64_t>(weight + kMassMagic) - kMassMagicBits;
#endif
}

// The mass that a top_p below 1 asks for, of the mass `total` that is there. Within 2^-21 of the
// whole, the rounding of float32 weights, counts as reached; otherwise {0.5, 0.3, 0.2} with top_p
// 0.8 might keep all three.
WINTSERVE_HOST_DEVICE inline uint64_t EnoughMass(float top_p, uint64_t total) {
  constexpr double kRounding = 0x1p-21;
  const double enough = (static_cast<double>(top_p) - kRounding) * static_cast<double>(total);
  return enough <= 1 ? 1 : static_cast<uint64_t>(std::ceil(enough));
}

// A uniform number of 24 bits: the upper ones of word 0 of Philox4x32-10 with key = seed (low, high
// half) and counter = (position, choice_index, 0, 0). `position` is the drawn token's.
WINTSERVE_HOST_DEVICE constexpr uint32_t UniformBits(int64_t seed, uint32_t position,
                                                     uint32_t choice_index) {
  const auto bits = static_cast<uint64_t>(seed);
  const PhiloxKey key = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  return Philox4x32({position, choice_index, 0, 0}, key)[0] >> 8;
}

// floor(uniform_bits / 2^24 * total), less than `total`. REQUIRES: 0 < total < 2^63.
WINTSERVE_HOST_DEVICE constexpr uint64_t TargetMass(uint32_t uniform_bits, uint64_t total) {
  const uint64_t high = total >> 24;
  const uint64_t low = total & 0xffffff;
  return uniform_bits * high + (uniform_bits * low >> 24);
}

// An id with its place in the order of step 9, packed so that plain integer order is that order.
// -0 and 0 are equal logits.
using Candidate = uint64_t;

WINTSERVE_HOST_DEVICE inline uint32_t FallingKey(float logit) {
  const auto bits = std::bit_cast<uint32_t>(Add(logit, 0.0f));
  return (bits >> 31) != 0 ? bits : ~bits & 0x7fffffffu;
}

WINTSERVE_HOST_DEVICE constexpr Candidate CandidateOf(uint32_t falling_key, uint32_t id) {
  return uint64_t{falling_key} << 32 | id;
}

WINTSERVE_HOST_DEVICE constexpr int32_t IdOf(Candidate candidate) {
  return static_cast<int32_t>(candidate & 0xffffffff);
}

WINTSERVE_HOST_DEVICE inline float LogitOfKey(uint32_t falling_key) {
  return std::bit_cast<float>((falling_key >> 31) != 0 ? falling_key : ~falling_key & 0x7fffffffu);
}

WINTSERVE_HOST_DEVICE inline float LogitOf(Candidate candidate) {
  return LogitOfKey(static_cast<uint32_t>(candidate >> 32));
}

// Step 2: log softmax, where total_mass is that of all ids at temperature 1, and maximum the
// largest logit. float64 but for the weights; devices may differ in the last bit of the float32
// result, because their logarithms do.
WINTSERVE_HOST_DEVICE inline float LogProbability(float logit, float maximum, uint64_t total_mass) {
  const double log_total = std::log(static_cast<double>(total_mass) * kMassUnit);
  return static_cast<float>(static_cast<double>(logit) - static_cast<double>(maximum) - log_total);
}

}  // namespace wintserve::kernels::sampling
