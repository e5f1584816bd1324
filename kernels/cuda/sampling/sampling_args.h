// What the sampling kernels are asked for. Without a CUDA header, so that tests without a GPU see
// the same structs.
#pragma once

#include <cstdint>

#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {

// What one row asks for. Device memory; made on the host.
struct SamplingRow {
  int32_t slot = -1;  // of the sequence; -1: no row, nothing is read or written for it
  float temperature = 1.0f;
  float top_p = 1.0f;
  int32_t top_k = 0;
  float min_p = 0.0f;
  float min_scaled_logit = sampling::kMinScaledLogit;  // MinScaledLogit(min_p)
  sampling::Penalties penalties = {};                  // other than none: with token_counts
  int32_t num_logit_bias = 0;
  int32_t masks_stop_ids = 0;     // 1: the launch's stop_ids are masked
  int32_t num_top_logprobs = -1;  // 0 … sampling::kMaxTopLogprobs; -1: no log-probability either
  uint32_t position = 0;          // of the drawn token in its sequence
  uint32_t choice_index = 0;
  int64_t seed = 0;
};

// Pointers are device memory.
struct SamplingArgs {
  const float* logits = nullptr;      // [num_rows, vocabulary], row r at logits + r * logits_stride
  int64_t logits_stride = 0;          // any; rows at multiples of 16 bytes are read faster
  int32_t num_rows = 0;               // may be 0
  int32_t vocabulary = 0;             // ids that are sampled, 1 … sampling::kMaxVocabulary
  const SamplingRow* rows = nullptr;  // [num_rows]; no two have one slot

  const int32_t* stop_ids = nullptr;  // [num_stop_ids] in rising order, each once
  int32_t num_stop_ids = 0;
  // By slot: num_logit_bias entries from logit_bias + slot * logit_bias_stride, ids rising, each
  // once. Null if no row has any.
  const sampling::LogitBias* logit_bias = nullptr;
  int64_t logit_bias_stride = 0;
  // By slot: the Occurrence of each id. Read and, with the drawn id, kept up for rows that have
  // penalties; null if none has. token_counts_stride is a multiple of 4 and at least vocabulary.
  sampling::Occurrence* token_counts = nullptr;
  int64_t token_counts_stride = 0;

  // [num_rows]: the drawn id; -1 - j if the logit of j, the lowest such id, is NaN or infinite.
  int32_t* ids = nullptr;
  // By slot: the same, but 0 in place of a negative. The next step's input. May be null.
  int32_t* last_ids = nullptr;
};

// Log-probabilities of ids[r] and of the num_top_logprobs most probable ids of row r, from the
// logits as the model gave them. Rows that ask for none are left alone. A row whose id is negative,
// or which has a NaN or an infinity, has NaN and rank 0, and -1 for top ids.
struct LogprobArgs {
  const float* logits = nullptr;  // as in SamplingArgs
  int64_t logits_stride = 0;
  int32_t num_rows = 0;
  int32_t vocabulary = 0;
  const SamplingRow* rows = nullptr;  // [num_rows]; null: every row asks for num_top
  int32_t num_top = 0;                // 0 … sampling::kMaxTopLogprobs
  const int32_t* ids = nullptr;       // [num_rows]

  float* logprobs = nullptr;  // [num_rows]
  int32_t* ranks = nullptr;   // [num_rows], from 1; may be null
  // [num_rows, top_stride]: in the order of falling logits; -1 and NaN beyond the vocabulary. Null
  // if no row asks for any. top_stride >= every num_top_logprobs.
  int32_t* top_ids = nullptr;
  float* top_logprobs = nullptr;
  int64_t top_stride = 0;
};

// Makes `counts` [vocabulary] those of a sequence with this prompt and these generated ids, device
// memory. Ids that are not sampled (at and beyond the vocabulary) do not count.
struct TokenCountsArgs {
  sampling::Occurrence* counts = nullptr;
  int32_t vocabulary = 0;
  const int32_t* prompt_ids = nullptr;
  int32_t num_prompt_ids = 0;
  const int32_t* generated_ids = nullptr;
  int32_t num_generated_ids = 0;
};

}  // namespace wintserve::kernels::cuda
