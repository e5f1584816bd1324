#include "tools/quantizer/forward/sequence_batches.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <utility>

#include "common/check.h"

namespace wintserve::quantizer {
namespace {

int64_t BlocksOf(const TokenSequence& sequence) {
  return (std::ssize(sequence) + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
}

}  // namespace

SequenceBatches::SequenceBatches(std::vector<TokenSequence> sequences, int64_t max_batch_tokens)
    : sequences_(std::move(sequences)) {
  CHECK(!sequences_.empty());
  Range range;
  int64_t max_blocks = 0;
  const auto finish = [&] {
    limits_.max_tokens = std::max(limits_.max_tokens, range.num_tokens);
    limits_.max_rows = std::max(limits_.max_rows, range.num_sequences);
    max_blocks = std::max(max_blocks, range.num_blocks);
    ranges_.push_back(range);
    range = {range.first_token + range.num_tokens, 0, range.first_sequence + range.num_sequences};
  };
  for (const TokenSequence& sequence : sequences_) {
    const int64_t length = std::ssize(sequence);
    CHECK(length > 0);
    if (range.num_tokens > 0 && range.num_tokens + length > max_batch_tokens) finish();
    range.num_tokens += length;
    range.num_sequences += 1;
    range.num_blocks += BlocksOf(sequence);
    limits_.max_blocks_per_row = std::max(limits_.max_blocks_per_row, BlocksOf(sequence));
    num_tokens_ += length;
  }
  finish();
  limits_.num_slots = 1;
  block_ids_.resize(max_blocks);
  std::iota(block_ids_.begin(), block_ids_.end(), 0);
}

kernels::Batch SequenceBatches::MakeBatch(const Range& range) const {
  kernels::Batch batch;
  batch.tokens.reserve(range.num_tokens);
  int64_t first_block = 0;
  for (int64_t s = range.first_sequence; s < range.first_sequence + range.num_sequences; ++s) {
    const TokenSequence& sequence = sequences_[s];
    batch.tokens.insert(batch.tokens.end(), sequence.begin(), sequence.end());
    batch.rows.push_back(
        {.position = 0,
         .length = static_cast<int32_t>(sequence.size()),
         .block_table = std::span(block_ids_).subspan(first_block, BlocksOf(sequence))});
    first_block += BlocksOf(sequence);
  }
  return batch;
}

}  // namespace wintserve::quantizer
