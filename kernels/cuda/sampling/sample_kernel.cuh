// Draws the ids of a batch of rows: one cluster of blocks, or one block, a row.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/sampling/logit_source.cuh"
#include "kernels/cuda/sampling/row_blocks.cuh"
#include "kernels/cuda/sampling/row_selection.cuh"
#include "kernels/cuda/sampling/sampling_args.h"
#include "kernels/plan/sampling_plan.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {

// How many of the stop ids a row masks: none if that would be all there is.
WINTSERVE_DEVICE int CountMasked(const SamplingArgs& args, const SamplingRow& row) {
  if (row.masks_stop_ids == 0) return 0;
  int count = 0;
  while (count < args.num_stop_ids && args.stop_ids[count] < args.vocabulary) ++count;
  return count < args.vocabulary ? count : 0;
}

WINTSERVE_DEVICE LogitSource SourceOf(const SamplingArgs& args, const SamplingRow& row,
                                      int num_masked, const RowBlocks& blocks,
                                      const plan::SamplingPlan& plan) {
  const int64_t row_index = BlockIndex() / plan.blocks_per_row;
  LogitSource source(args.logits + row_index * args.logits_stride, args.vocabulary, blocks, plan);
  if (!row.penalties.none()) {
    source.counts = args.token_counts + row.slot * args.token_counts_stride;
    source.penalties = row.penalties;
  }
  source.num_bias = row.num_logit_bias;
  source.num_stop_ids = num_masked;
  if (source.num_bias > 0) source.bias = args.logit_bias + row.slot * args.logit_bias_stride;
  if (source.num_stop_ids > 0) source.stop_ids = args.stop_ids;
  if (source.num_bias > 0 || source.num_stop_ids > 0) {
    source.Mark(reinterpret_cast<uint32_t*>(SharedMemory() + plan.marks_offset()));
  }
  return source;
}

// In the order of falling logits. The id is known in block 0; other blocks may return early.
WINTSERVE_DEVICE int DrawByFallingLogit(const SamplingRow& row, uint32_t uniform_bits,
                                        const RowBlocks& blocks, RowSelection* selection) {
  selection->CountBins();
  Place place = {.mass = selection->mass()};
  // A loop, so that the code of Select is there once: it is large.
  enum Step { kTopK, kTopP, kDraw, kDone };
  for (int step = kTopK; step != kDone; ++step) {
    Goal goal;
    if (step == kTopK) {
      if (row.top_k == 0 || static_cast<uint32_t>(row.top_k) >= selection->count()) continue;
      goal = {.is_count = true, .amount = static_cast<uint64_t>(row.top_k)};
    } else if (step == kTopP) {
      if (row.top_p == 1) continue;
      goal = {.amount = sampling::EnoughMass(row.top_p, place.mass)};
    } else {
      goal = {.amount = sampling::TargetMass(uniform_bits, place.mass) + 1};
    }
    place = selection->Select(goal);
    if (selection->lists_first() && blocks.index != 0) return 0;
  }
  return sampling::IdOf(place.candidate);
}

WINTSERVE_DEVICE int Draw(const SamplingArgs& args, const SamplingRow& row, const RowBlocks& blocks,
                          const plan::SamplingPlan& plan) {
  const int num_masked = CountMasked(args, row);
  RowSelection selection(SourceOf(args, row, num_masked, blocks, plan), blocks, plan);
  const uint64_t best = selection.FindBest();
  if (best >> 32 == 0) return -1 - static_cast<int>(best);
  if (row.temperature == 0) return sampling::IdOf(best);
  selection.SetScale({.maximum = sampling::LogitOf(best),
                      .temperature = row.temperature,
                      .min_scaled_logit = row.min_scaled_logit});
  const uint32_t uniform_bits = sampling::UniformBits(row.seed, row.position, row.choice_index);
  const bool cuts_k = row.top_k > 0 && row.top_k < args.vocabulary - num_masked;
  if (row.top_p < 1 || row.min_p > 0 || cuts_k) {
    return DrawByFallingLogit(row, uniform_bits, blocks, &selection);
  }
  return selection.DrawById(uniform_bits);
}

// By a grid of args.num_rows * plan.blocks_per_row blocks of kSamplingThreads.
WINTSERVE_DEVICE void SampleRow(const SamplingArgs& args, const plan::SamplingPlan& plan) {
  const RowBlocks blocks(plan.blocks_per_row);
  const int row_index = BlockIndex() / plan.blocks_per_row;
  const SamplingRow row = args.rows[row_index];
  if (row.slot < 0) return;
  const int id = Draw(args, row, blocks, plan);
  if (blocks.index == 0 && ThreadIndex() == 0) {
    args.ids[row_index] = id;
    if (args.last_ids != nullptr) args.last_ids[row.slot] = max(id, 0);
    if (id >= 0 && !row.penalties.none()) {
      ++args.token_counts[row.slot * args.token_counts_stride + id];
    }
  }
  // Others may still be reading this block's shared memory.
  blocks.Sync();
}

}  // namespace wintserve::kernels::cuda
