// Reads log-probabilities of a batch of rows: one cluster of blocks, or one block, a row.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/sampling/logit_source.cuh"
#include "kernels/cuda/sampling/row_blocks.cuh"
#include "kernels/cuda/sampling/row_selection.cuh"
#include "kernels/cuda/sampling/sampling_args.h"
#include "kernels/plan/sampling_plan.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {

// What a row without a drawn id has: block 0.
WINTSERVE_DEVICE void WriteNoLogprobs(const LogprobArgs& args, int row_index, int num_top) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (ThreadIndex() == 0) {
    args.logprobs[row_index] = nan;
    if (args.ranks != nullptr) args.ranks[row_index] = 0;
  }
  for (int i = ThreadIndex(); i < num_top; i += plan::kSamplingThreads) {
    args.top_ids[row_index * args.top_stride + i] = -1;
    args.top_logprobs[row_index * args.top_stride + i] = nan;
  }
}

// Block 0: the first elements of the sorted list.
WINTSERVE_DEVICE void WriteTopLogprobs(const LogprobArgs& args, int row_index, int num_top,
                                       int num_listed, const RowSelection& selection, float maximum,
                                       uint64_t total) {
  for (int i = ThreadIndex(); i < num_top; i += plan::kSamplingThreads) {
    const int64_t place = row_index * args.top_stride + i;
    const bool is_listed = i < num_listed;
    const sampling::Candidate candidate = is_listed ? selection.list()[i] : 0;
    args.top_ids[place] = is_listed ? sampling::IdOf(candidate) : -1;
    args.top_logprobs[place] =
        is_listed ? sampling::LogProbability(sampling::LogitOf(candidate), maximum, total)
                  : std::numeric_limits<float>::quiet_NaN();
  }
}

WINTSERVE_DEVICE void ReadLogprobs(const LogprobArgs& args, int row_index, int num_top,
                                   const RowBlocks& blocks, const plan::SamplingPlan& plan) {
  const float* const logits = args.logits + row_index * args.logits_stride;
  RowSelection selection(LogitSource(logits, args.vocabulary, blocks, plan), blocks, plan);
  const uint64_t best = selection.FindBest();
  if (best >> 32 == 0) {  // a logit is not finite
    if (blocks.index == 0) WriteNoLogprobs(args, row_index, num_top);
    return;
  }
  const float maximum = sampling::LogitOf(best);
  selection.SetScale({.maximum = maximum, .counts_all = true});
  selection.CountBins();
  const uint64_t total = selection.mass();

  const int id = args.ids[row_index];
  const bool exists = id < args.vocabulary;
  const float logit = exists ? logits[id] : -std::numeric_limits<float>::infinity();
  const uint64_t rank = exists ? selection.CountUpTo(sampling::CandidateOf(
                                     sampling::FallingKey(logit), static_cast<uint32_t>(id)))
                               : static_cast<uint64_t>(args.vocabulary) + 1;
  if (blocks.index == 0 && ThreadIndex() == 0) {
    args.logprobs[row_index] = sampling::LogProbability(logit, maximum, total);
    if (args.ranks != nullptr) args.ranks[row_index] = static_cast<int32_t>(rank);
  }
  if (num_top == 0) return;
  const int num_listed = min(num_top, args.vocabulary);
  const Place last =
      selection.Select({.is_count = true, .amount = static_cast<uint64_t>(num_listed)});
  if (!selection.lists_first()) {
    selection.ListUpTo(last.candidate, static_cast<uint32_t>(num_listed));
  }
  if (blocks.index == 0) {
    WriteTopLogprobs(args, row_index, num_top, num_listed, selection, maximum, total);
  }
}

// Of that row; -1: no log-probability either.
WINTSERVE_DEVICE int NumTopOf(const LogprobArgs& args, int row_index) {
  if (args.rows == nullptr) return args.num_top;
  const SamplingRow& row = args.rows[row_index];
  return row.slot < 0 ? -1 : row.num_top_logprobs;
}

// By a grid of args.num_rows * plan.blocks_per_row blocks of kSamplingThreads.
WINTSERVE_DEVICE void LogprobsOfRow(const LogprobArgs& args, const plan::SamplingPlan& plan) {
  const RowBlocks blocks(plan.blocks_per_row);
  const int row_index = BlockIndex() / plan.blocks_per_row;
  const int num_top = NumTopOf(args, row_index);
  if (num_top < 0) return;
  if (args.ids[row_index] < 0) {
    if (blocks.index == 0) WriteNoLogprobs(args, row_index, num_top);
    return;
  }
  ReadLogprobs(args, row_index, num_top, blocks, plan);
  // Others may still be reading this block's shared memory.
  blocks.Sync();
}

}  // namespace wintserve::kernels::cuda
