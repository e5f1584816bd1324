#include <cuda_runtime.h>

#include "common/check.h"
#include "kernels/cuda/sampling/launch_rows.cuh"
#include "kernels/cuda/sampling/logit_source.cuh"
#include "kernels/cuda/sampling/row_group.cuh"
#include "kernels/cuda/sampling/row_selection.cuh"
#include "kernels/cuda/sampling/sampling.h"
#include "kernels/plan/sampling_plan.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {
namespace {

// What a row without a drawn id has: block 0.
__device__ void WriteNothing(const LogprobArgs& args, int row_index, int num_top) {
  const float nan = nanf("");
  if (threadIdx.x == 0) {
    args.logprobs[row_index] = nan;
    if (args.ranks != nullptr) args.ranks[row_index] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < num_top; i += plan::kSamplingThreads) {
    args.top_ids[row_index * args.top_stride + i] = -1;
    args.top_logprobs[row_index * args.top_stride + i] = nan;
  }
}

// Block 0: the first elements of the sorted list.
__device__ void WriteTop(const LogprobArgs& args, int row_index, int num_top, int num_listed,
                         const RowSelection& selection, float maximum, uint64_t total) {
  for (int i = static_cast<int>(threadIdx.x); i < num_top; i += plan::kSamplingThreads) {
    const int64_t place = row_index * args.top_stride + i;
    const bool is_listed = i < num_listed;
    const sampling::Candidate candidate = is_listed ? selection.list()[i] : 0;
    args.top_ids[place] = is_listed ? sampling::IdOf(candidate) : -1;
    args.top_logprobs[place] =
        is_listed ? sampling::LogProbability(sampling::LogitOf(candidate), maximum, total)
                  : nanf("");
  }
}

__device__ void ReadRow(const LogprobArgs& args, int row_index, int num_top,
                        const RowBlocks& blocks, const plan::SamplingPlan& plan) {
  const float* const logits = args.logits + row_index * args.logits_stride;
  RowSelection selection(LogitSource(logits, args.vocabulary, blocks, plan), blocks, plan);
  const uint64_t best = selection.FindBest();
  if (best >> 32 == 0) {  // a logit is not finite
    if (blocks.index == 0) WriteNothing(args, row_index, num_top);
    return;
  }
  const float maximum = sampling::LogitOf(best);
  selection.SetScale({.maximum = maximum, .counts_all = true});
  selection.CountBins();
  const uint64_t total = selection.mass();

  const int id = args.ids[row_index];
  const float logit = logits[id];
  const uint64_t rank = selection.CountUpTo(
      sampling::CandidateOf(sampling::FallingKey(logit), static_cast<uint32_t>(id)));
  if (blocks.index == 0 && threadIdx.x == 0) {
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
    WriteTop(args, row_index, num_top, num_listed, selection, maximum, total);
  }
}

__global__ void __launch_bounds__(plan::kSamplingThreads, 2)
    LogprobKernel(const LogprobArgs args, const plan::SamplingPlan plan) {
  const RowBlocks blocks(plan.blocks_per_row);
  const auto row_index = static_cast<int>(blockIdx.x) / plan.blocks_per_row;
  const SamplingRow& row = args.rows[row_index];
  const int num_top = row.num_top_logprobs;
  if (row.slot < 0 || num_top < 0) return;
  if (args.ids[row_index] < 0) {
    if (blocks.index == 0) WriteNothing(args, row_index, num_top);
    return;
  }
  ReadRow(args, row_index, num_top, blocks, plan);
  // Others may still be reading this block's shared memory.
  blocks.Sync();
}

}  // namespace

void PrepareLogprobs() { PrepareRows(&LogprobKernel, /*max_blocks_per_row=*/1); }

void LaunchLogprobs(const LogprobArgs& args, const plan::SamplingDevice& device,
                    cudaStream_t stream) {
  CHECK(args.num_rows >= 0, "num_rows={}", args.num_rows);
  CHECK(args.vocabulary >= 1 && args.vocabulary <= sampling::kMaxVocabulary, "vocabulary={}",
        args.vocabulary);
  if (args.num_rows == 0) return;
  LaunchRows(&LogprobKernel, args, device, stream);
}

}  // namespace wintserve::kernels::cuda
