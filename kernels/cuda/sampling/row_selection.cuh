// Finds an element of a row by its place in the order of falling logits: the first at which so many
// ids, or so much mass, have come together.
//
// Sorting a row would cost more than all the rest, so a histogram over the scaled logit shows how
// much lies in each of 512 ranges, and only the range with the place looked for is sorted: in one
// block, with all before it if they are few, which answers later and smaller questions as well. A
// range of too many ids is divided by the bits of their logits; equal ones are counted by id.
//
// Everything is added up in whole numbers, so that neither the number of blocks nor the order in
// which threads come changes a result.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/sampling/logit_source.cuh"
#include "kernels/cuda/sampling/row_blocks.cuh"
#include "kernels/plan/sampling_plan.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cuda {

// A histogram of one block. Masses in two halves: shared memory adds 32-bit numbers natively,
// 64-bit ones only by comparing and swapping.
struct BlockHistogram {
  uint32_t counts[plan::kSamplingBins];
  uint32_t mass_lows[plan::kSamplingBins];
  uint32_t mass_highs[plan::kSamplingBins];
};

// A histogram of the row, each bin with all before it.
struct RunningHistogram {
  uint64_t masses[plan::kSamplingBins];
  uint32_t counts[plan::kSamplingBins];
};

// A place in the order: the element, and the mass up to and with it.
struct Place {
  sampling::Candidate candidate = 0;
  uint64_t mass = 0;
};

// What a block has in shared memory besides the plan's part.
struct SelectionMemory {
  sampling::Candidate list[plan::kSamplingListSize];  // used in block 0
  uint64_t running_masses[plan::kSamplingListSize];   // of the list
  uint64_t scratch[plan::kSamplingWarps];
  RunningHistogram coarse;
  RunningHistogram fine;
  BlockHistogram histogram;
  // Written in one block, read by the others.
  uint64_t best;
  uint64_t sum;
  Place place;
  uint32_t list_size;
  // Of the block alone.
  int found;
  uint64_t found_rest;
};

constexpr int kSelectionBytes = (static_cast<int>(sizeof(SelectionMemory)) + 15) / 16 * 16;

// How logits become scaled logits, masses and members of the order.
struct LogitScale {
  float maximum = 0;
  float temperature = 1;
  float min_scaled_logit = sampling::kMinScaledLogit;
  // Ids without mass are elements, too: for log-probabilities.
  bool counts_all = false;

  WINTSERVE_DEVICE float Scaled(float logit) const {
    return sampling::ScaledLogit(logit, maximum, temperature);
  }
  WINTSERVE_DEVICE bool Has(float scaled_logit) const {
    return counts_all || scaled_logit >= min_scaled_logit;
  }
  WINTSERVE_DEVICE uint64_t MassOf(float scaled_logit) const {
    return sampling::Mass(sampling::Weight(scaled_logit, min_scaled_logit));
  }
  // Of the coarse histogram: 16 bins are a factor e of the weight; the last one has the rest.
  WINTSERVE_DEVICE static int Bin(float scaled_logit) {
    return static_cast<int>(
        fminf(sampling::Multiply(scaled_logit, -16.0f), plan::kSamplingBins - 1));
  }
};

// What is looked for: the first element with which `amount` ids or units of mass are reached.
struct Goal {
  bool is_count = false;
  uint64_t amount = 0;  // at least 1, at most what there is
};

// A run of the order: elements of these bins whose key is within these bounds.
struct Range {
  int first_bin = 0;
  int last_bin = 0;
  uint32_t first_key = 0;
  uint32_t last_key = 0xffffffffu;
  uint32_t last_id = 0xffffffffu;  // of elements with last_key
  uint32_t count = 0;              // of the row's elements in the run
  uint32_t count_before = 0;
  uint64_t mass_before = 0;
};

// Threading: every method is called by all threads of the row together, unless it says otherwise.
class RowSelection {
 public:
  WINTSERVE_DEVICE RowSelection(const LogitSource& source, const RowBlocks& blocks,
                                const plan::SamplingPlan& plan)
      : source_(source),
        blocks_(blocks),
        memory_(*reinterpret_cast<SelectionMemory*>(SharedMemory())),
        chunk_sums_(reinterpret_cast<uint64_t*>(SharedMemory() + plan.chunk_sums_offset())) {
    if (ThreadIndex() == 0) memory_.list_size = 0;
  }

  // The largest processed logit as a candidate, which is the first in the order. Below 2^32: the
  // lowest id whose logit is not finite. Fills the source's cache.
  WINTSERVE_DEVICE uint64_t FindBest() {
    uint64_t best = ~uint64_t{0};
    float best_logit = 0;
    bool has_best = false;
    uint32_t best_id = 0;
    source_.ForEachChunk<4>([&](int, int id) {
      const FourLogits raw = source_.ReadRaw(id);
      const FourLogits x = source_.Process(id, raw);
      source_.Cache(id, x);
      for (int i = 0; i < 4; ++i) {
        if (id + i >= source_.end) break;
        if (!(fabsf(raw.value[i]) <= FLT_MAX)) best = Least(best, static_cast<uint64_t>(id + i));
        if (!has_best || x.value[i] > best_logit) {
          has_best = true;
          best_logit = x.value[i];
          best_id = static_cast<uint32_t>(id + i);
        }
      }
    });
    if (has_best) {
      best = Least(best, sampling::CandidateOf(sampling::FallingKey(best_logit), best_id));
    }
    best = BlockMinimum(best, memory_.scratch);
    if (ThreadIndex() == 0) memory_.best = best;
    blocks_.Sync();
    for (int block = 0; block < blocks_.count; ++block) {
      best = Least(best, *blocks_.Of(block, &memory_.best));
    }
    return best;
  }

  WINTSERVE_DEVICE void SetScale(const LogitScale& scale) { scale_ = scale; }

  // The id at which the running mass by rising id is more than uniform_bits / 2^24 of the whole.
  WINTSERVE_DEVICE int DrawById(uint32_t uniform_bits) {
    const auto mass = [&](float logit) { return scale_.MassOf(scale_.Scaled(logit)); };
    const uint64_t total = SumChunks(mass);
    return FindById(mass, sampling::TargetMass(uniform_bits, total) + 1);
  }

  // Counts every element. Before any Select.
  WINTSERVE_DEVICE void CountBins() {
    ClearHistogram();
    source_.ForEachChunk([&](int, int id) {
      const FourLogits x = source_.Read(id);
      for (int i = 0; i < 4; ++i) {
        const float scaled = scale_.Scaled(x.value[i]);
        const bool has = id + i < source_.end && scale_.Has(scaled);
        AddToHistogram(has, has ? LogitScale::Bin(scaled) : 0, scaled);
      }
    });
    ReduceHistogram(&memory_.coarse);
  }

  // After CountBins: of the row.
  WINTSERVE_DEVICE uint32_t count() const { return memory_.coarse.counts[plan::kSamplingBins - 1]; }
  WINTSERVE_DEVICE uint64_t mass() const { return memory_.coarse.masses[plan::kSamplingBins - 1]; }

  // How many elements are `candidate` or before it.
  WINTSERVE_DEVICE uint64_t CountUpTo(sampling::Candidate candidate) {
    uint64_t count = 0;
    source_.ForEachChunk([&](int, int id) {
      const FourLogits x = source_.Read(id);
      for (int i = 0; i < 4; ++i) {
        const auto other =
            sampling::CandidateOf(sampling::FallingKey(x.value[i]), static_cast<uint32_t>(id + i));
        count += id + i < source_.end && other <= candidate ? 1 : 0;
      }
    });
    return RowSum(BlockSum(count, memory_.scratch));
  }

  // Whether list() has the first elements of the order up to the place last selected. From then on
  // Select is called in block 0 alone.
  WINTSERVE_DEVICE bool lists_first() const { return lists_first_; }
  // In block 0. Valid until the next Select that does not find lists_first().
  WINTSERVE_DEVICE const sampling::Candidate* list() const { return memory_.list; }

  // REQUIRES: once lists_first(), a goal no later than the one that was selected last.
  WINTSERVE_DEVICE Place Select(const Goal& goal) {
    if (lists_first_) return FindInList(goal);
    Range range = FindRange(goal);
    if (range.count_before + range.count <= plan::kSamplingListSize) {
      range.first_bin = 0;
      range.first_key = 0;
      range.count += range.count_before;
      range.count_before = 0;
      range.mass_before = 0;
      lists_first_ = true;
    }
    return range.count <= plan::kSamplingListSize ? SelectInRange(goal, range)
                                                  : SelectAmongEqual(goal, range);
  }

  // Makes list() the elements up to `last`, sorted. REQUIRES: at most kSamplingListSize.
  WINTSERVE_DEVICE void ListUpTo(sampling::Candidate last, uint32_t count) {
    Range range = {.last_bin = plan::kSamplingBins - 1,
                   .last_key = static_cast<uint32_t>(last >> 32),
                   .last_id = static_cast<uint32_t>(last),
                   .count = count};
    Gather(range);
    if (blocks_.index == 0) SortList(range);
  }

 private:
  WINTSERVE_DEVICE static uint64_t Least(uint64_t a, uint64_t b) { return b < a ? b : a; }

  // --- Sums by id -------------------------------------------------------------------------------

  // The row's sum of value(logit); chunk_sums_ become those of this block.
  template <typename Value>
  WINTSERVE_DEVICE uint64_t SumChunks(Value value) {
    uint64_t sum = 0;
    source_.ForEachChunk([&](int chunk, int id) {
      const uint64_t in_chunk = WarpSum(SumOfFour(value, id));
      if (Lane() == 0) chunk_sums_[chunk] = in_chunk;
      sum += in_chunk;
    });
    // Every lane has its warp's sum.
    return RowSum(BlockSum(Lane() == 0 ? sum : 0, memory_.scratch));
  }

  template <typename Value>
  WINTSERVE_DEVICE uint64_t SumOfFour(Value value, int id) {
    const FourLogits x = source_.Read(id);
    uint64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += id + i < source_.end ? value(x.value[i]) : 0;
    return sum;
  }

  // The sum over the row's blocks of a number that all threads of a block have.
  WINTSERVE_DEVICE uint64_t RowSum(uint64_t value) {
    if (ThreadIndex() == 0) memory_.sum = value;
    blocks_.Sync();
    uint64_t sum = 0;
    for (int block = 0; block < blocks_.count; ++block) sum += *blocks_.Of(block, &memory_.sum);
    return sum;
  }

  // After SumChunks of the same values: the first id by which they add up to `amount`, which is at
  // least 1 and at most their sum.
  template <typename Value>
  WINTSERVE_DEVICE int FindById(Value value, uint64_t amount) {
    uint64_t before = 0;
    for (int block = 0; block < blocks_.index; ++block) before += *blocks_.Of(block, &memory_.sum);
    if (before < amount && amount <= before + memory_.sum) {
      const int chunk = FindChunk(amount - before);
      if (Warp() == 0) FindInChunk(value, chunk, memory_.found_rest);
    }
    blocks_.Sync();
    return sampling::IdOf(blocks_.Of(0, &memory_.place)->candidate);
  }

  // Which chunk of this block `amount` falls in; found_rest is what is left of it there. All
  // threads of this block.
  WINTSERVE_DEVICE int FindChunk(uint64_t amount) {
    const int num_chunks =
        (source_.end - source_.begin + plan::kSamplingChunk - 1) / plan::kSamplingChunk;
    const int per_thread = (num_chunks + plan::kSamplingThreads - 1) / plan::kSamplingThreads;
    const int first = ThreadIndex() * per_thread;
    uint64_t sum = 0;
    for (int i = first; i < min(num_chunks, first + per_thread); ++i) sum += chunk_sums_[i];
    uint64_t running = BlockRunningSum(sum, memory_.scratch) - sum;
    for (int i = first; i < min(num_chunks, first + per_thread); ++i) {
      if (running < amount && amount <= running + chunk_sums_[i]) {
        memory_.found = i;
        memory_.found_rest = amount - running;
      }
      running += chunk_sums_[i];
    }
    SyncBlock();
    return memory_.found;
  }

  // One warp: writes the id to block 0's place.
  template <typename Value>
  WINTSERVE_DEVICE void FindInChunk(Value value, int chunk, uint64_t amount) {
    const int id = source_.FirstId(chunk);
    const uint64_t sum = SumOfFour(value, id);
    uint64_t running = WarpRunningSum(sum) - sum;
    if (running >= amount || amount > running + sum) return;
    const FourLogits x = source_.Read(id);
    for (int i = 0; i < 4; ++i) {
      running += value(x.value[i]);
      if (running < amount) continue;
      blocks_.Of(0, &memory_.place)->candidate = static_cast<uint32_t>(id + i);
      return;
    }
  }

  // --- Histograms -------------------------------------------------------------------------------

  // The other blocks must have read this block's histogram before: see ReduceHistogram.
  WINTSERVE_DEVICE void ClearHistogram() {
    memory_.histogram.counts[ThreadIndex()] = 0;
    memory_.histogram.mass_lows[ThreadIndex()] = 0;
    memory_.histogram.mass_highs[ThreadIndex()] = 0;
    SyncBlock();
  }

  // All lanes of a warp together.
  WINTSERVE_DEVICE void AddToHistogram(bool has, int bin, float scaled_logit) {
    const uint32_t lanes = Ballot(has);
    if (lanes == 0) return;
    uint64_t mass = has ? scale_.MassOf(scaled_logit) : 0;
    if (lanes == 0xFFFFFFFFu) {
      // Where many logits are alike, additions to one bin would queue up.
      if (IsSameInWarp(bin)) {
        mass = WarpSum(mass);
        if (Lane() == 0) AddToBin(bin, 32, mass);
        return;
      }
    }
    if (has) AddToBin(bin, 1, mass);
  }

  WINTSERVE_DEVICE void AddToBin(int bin, uint32_t count, uint64_t mass) {
    BlockHistogram& histogram = memory_.histogram;
    FetchAndAdd(&histogram.counts[bin], count);
    const auto low = static_cast<uint32_t>(mass);
    const uint32_t low_before = FetchAndAdd(&histogram.mass_lows[bin], low);
    const uint32_t carry = low_before + low < low_before ? 1 : 0;
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + carry;
    if (high != 0) FetchAndAdd(&histogram.mass_highs[bin], high);
  }

  // Adds up the blocks' histograms. A second barrier lets every block write its own again.
  WINTSERVE_DEVICE void ReduceHistogram(RunningHistogram* running) {
    blocks_.Sync();
    uint64_t mass = 0;
    uint64_t count = 0;
    for (int block = 0; block < blocks_.count; ++block) {
      const BlockHistogram& histogram = *blocks_.Of(block, &memory_.histogram);
      mass += (uint64_t{histogram.mass_highs[ThreadIndex()]} << 32) +
              histogram.mass_lows[ThreadIndex()];
      count += histogram.counts[ThreadIndex()];
    }
    running->masses[ThreadIndex()] = BlockRunningSum(mass, memory_.scratch);
    running->counts[ThreadIndex()] = static_cast<uint32_t>(BlockRunningSum(count, memory_.scratch));
    blocks_.Sync();
  }

  // The bin in which the goal is reached, when *range has all bins; *range becomes what is in it.
  WINTSERVE_DEVICE int FindBin(const RunningHistogram& running, const Goal& goal, Range* range) {
    const auto reached = [&](int bin) {
      if (bin < 0) return goal.is_count ? uint64_t{range->count_before} : range->mass_before;
      return goal.is_count ? uint64_t{range->count_before} + running.counts[bin]
                           : range->mass_before + running.masses[bin];
    };
    const int own = ThreadIndex();
    if (reached(own - 1) < goal.amount && goal.amount <= reached(own)) memory_.found = own;
    SyncBlock();
    const int bin = memory_.found;
    SyncBlock();
    range->count = running.counts[bin];
    if (bin > 0) {
      range->count -= running.counts[bin - 1];
      range->count_before += running.counts[bin - 1];
      range->mass_before += running.masses[bin - 1];
    }
    return bin;
  }

  // A range that has the goal: of one bin, and of one key if it is too large for the list.
  WINTSERVE_DEVICE Range FindRange(const Goal& goal) {
    Range range;
    const int bin = FindBin(memory_.coarse, goal, &range);
    range.first_bin = range.last_bin = bin;
    // 9 bits of the key at a time, the last time 5.
    int shift = 23;
    while (range.count > plan::kSamplingListSize) {
      CountKeys(range, shift);
      const auto part = static_cast<uint32_t>(FindBin(memory_.fine, goal, &range));
      range.first_key += part << shift;
      range.last_key = range.first_key + ((1u << shift) - 1);
      if (shift == 0) break;
      shift = shift > 9 ? shift - 9 : 0;
    }
    return range;
  }

  WINTSERVE_DEVICE void CountKeys(const Range& range, int shift) {
    ClearHistogram();
    source_.ForEachChunk([&](int, int id) {
      const FourLogits x = source_.Read(id);
      for (int i = 0; i < 4; ++i) {
        const float scaled = scale_.Scaled(x.value[i]);
        const uint32_t key = sampling::FallingKey(x.value[i]);
        const bool has = IsIn(range, scaled, key, id + i);
        AddToHistogram(has, has ? static_cast<int>((key - range.first_key) >> shift) : 0, scaled);
      }
    });
    ReduceHistogram(&memory_.fine);
  }

  WINTSERVE_DEVICE bool IsIn(const Range& range, float scaled_logit, uint32_t key, int id) const {
    if (id >= source_.end || !scale_.Has(scaled_logit)) return false;
    const int bin = LogitScale::Bin(scaled_logit);
    if (bin < range.first_bin || bin > range.last_bin) return false;
    if (key < range.first_key || key > range.last_key) return false;
    return key < range.last_key || static_cast<uint32_t>(id) <= range.last_id;
  }

  // --- The list ---------------------------------------------------------------------------------

  // Puts a range's elements into block 0's list, in any order. list_size is 0 before.
  WINTSERVE_DEVICE void Gather(const Range& range) {
    uint32_t* const size = blocks_.Of(0, &memory_.list_size);
    sampling::Candidate* const list = blocks_.Of(0, memory_.list);
    source_.ForEachChunk([&](int, int id) {
      const FourLogits x = source_.Read(id);
      for (int i = 0; i < 4; ++i) {
        const uint32_t key = sampling::FallingKey(x.value[i]);
        if (!IsIn(range, scale_.Scaled(x.value[i]), key, id + i)) continue;
        const uint32_t place = FetchAndAdd(size, 1u);
        if (place < plan::kSamplingListSize) {
          list[place] = sampling::CandidateOf(key, static_cast<uint32_t>(id + i));
        }
      }
    });
    blocks_.Sync();
  }

  // Block 0: sorts the list, empties it for the next Gather to fill, and sums up its masses.
  WINTSERVE_DEVICE void SortList(const Range& range) {
    list_count_ = min(static_cast<int>(range.count), plan::kSamplingListSize);
    list_count_before_ = range.count_before;
    list_mass_before_ = range.mass_before;
    int size = 2;
    while (size < list_count_) size *= 2;
    for (int i = ThreadIndex(); i < size; i += plan::kSamplingThreads) {
      if (i >= list_count_) memory_.list[i] = ~sampling::Candidate{0};
    }
    if (ThreadIndex() == 0) memory_.list_size = 0;
    SyncBlock();
    // Bitonic: a thread has one pair of places at each step.
    for (int run = 2; run <= size; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int pair = ThreadIndex(); pair < size / 2; pair += plan::kSamplingThreads) {
          const int low = pair / step * step * 2 + pair % step;
          const bool rises = (low & run) == 0;
          const sampling::Candidate a = memory_.list[low];
          const sampling::Candidate b = memory_.list[low + step];
          if ((b < a) == rises) {
            memory_.list[low] = b;
            memory_.list[low + step] = a;
          }
        }
        SyncBlock();
      }
    }
    uint64_t mass[2] = {0, 0};
    for (int i = 0; i < 2; ++i) {
      if (ThreadIndex() * 2 + i < list_count_) {
        mass[i] =
            scale_.MassOf(scale_.Scaled(sampling::LogitOf(memory_.list[ThreadIndex() * 2 + i])));
      }
    }
    const uint64_t both = BlockRunningSum(mass[0] + mass[1], memory_.scratch) + range.mass_before;
    memory_.running_masses[ThreadIndex() * 2] = both - mass[1];
    memory_.running_masses[ThreadIndex() * 2 + 1] = both;
    SyncBlock();
  }

  // Block 0.
  WINTSERVE_DEVICE Place FindInList(const Goal& goal) {
    const auto reached = [&](int i) {
      if (goal.is_count) return uint64_t{list_count_before_} + static_cast<uint64_t>(i + 1);
      return i < 0 ? list_mass_before_ : memory_.running_masses[i];
    };
    for (int i = ThreadIndex(); i < list_count_; i += plan::kSamplingThreads) {
      if (reached(i - 1) < goal.amount && goal.amount <= reached(i)) {
        memory_.place = {.candidate = memory_.list[i], .mass = memory_.running_masses[i]};
      }
    }
    SyncBlock();
    const Place place = memory_.place;
    SyncBlock();
    return place;
  }

  WINTSERVE_DEVICE Place SelectInRange(const Goal& goal, const Range& range) {
    Gather(range);
    Place place;
    if (blocks_.index == 0) {
      SortList(range);
      place = FindInList(goal);
    }
    return lists_first_ ? place : SharePlace();  // once listed, block 0 goes on alone
  }

  // More elements than the list can take, all of one logit: the goal is reached with the n-th.
  WINTSERVE_DEVICE Place SelectAmongEqual(const Goal& goal, const Range& range) {
    const uint64_t mass = scale_.MassOf(scale_.Scaled(sampling::LogitOfKey(range.first_key)));
    const uint64_t nth = goal.is_count ? goal.amount - range.count_before
                                       : (goal.amount - range.mass_before + mass - 1) / mass;
    const auto is_equal = [&](float logit) {
      return sampling::FallingKey(logit) == range.first_key ? uint64_t{1} : uint64_t{0};
    };
    SumChunks(is_equal);
    const int id = FindById(is_equal, nth);
    blocks_.Sync();
    return {.candidate = sampling::CandidateOf(range.first_key, static_cast<uint32_t>(id)),
            .mass = range.mass_before + nth * mass};
  }

  WINTSERVE_DEVICE Place SharePlace() {
    blocks_.Sync();
    const Place place = *blocks_.Of(0, &memory_.place);
    blocks_.Sync();
    return place;
  }

  LogitSource source_;
  RowBlocks blocks_;
  SelectionMemory& memory_;
  uint64_t* const chunk_sums_;
  LogitScale scale_;
  bool lists_first_ = false;
  // Of the sorted list.
  int list_count_ = 0;
  uint32_t list_count_before_ = 0;
  uint64_t list_mass_before_ = 0;
};

}  // namespace wintserve::kernels::cuda
