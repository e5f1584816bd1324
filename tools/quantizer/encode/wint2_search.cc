#include "tools/quantizer/encode/wint2_search.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tools/quantizer/encode/wint2_search.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::quantizer {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using kernels::cpu::HWY_NAMESPACE::D;
using kernels::cpu::HWY_NAMESPACE::kLanes;
using kernels::cpu::HWY_NAMESPACE::V;

// Scales that one pass over the codewords serves. With two vectors of columns, their four weights,
// scales and least costs fill the registers of AVX-512.
constexpr int kPassScales = 5;
constexpr int kPassVecs = kLanes >= 16 ? 2 : 1;
static_assert(kTileColumns % (kPassVecs * kLanes) == 0);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Runs pass(first scale, number of scales as a constant) for all scales.
template <typename Pass>
HWY_INLINE void ForScales(int num_scales, const Pass& pass) {
  for (int s = 0; s < num_scales; s += kPassScales) {
    switch (std::min(kPassScales, num_scales - s)) {
      case 1:
        pass(s, std::integral_constant<int, 1>());
        break;
      case 2:
        pass(s, std::integral_constant<int, 2>());
        break;
      case 3:
        pass(s, std::integral_constant<int, 3>());
        break;
      case 4:
        pass(s, std::integral_constant<int, 4>());
        break;
      default:
        pass(s, std::integral_constant<int, kPassScales>());
        break;
    }
  }
}

// Adds the least costs of four rows in kPassVecs * kLanes columns: lanes are columns.
//   weighted       [4, kTileColumns], from the first column on; norms [256]
//   scales, costs  [kScales, kTileColumns], from the first column on
template <int kScales>
HWY_NOINLINE void AddLeastCosts(const Codebook& codebook, const float* weighted, const float* norms,
                                const float* scales, float* costs) {
  const D d;
  V x[kPassVecs][kWeightsOfByte];
  V half_scale[kPassVecs][kScales];
  V least[kPassVecs][kScales];
  WINTSERVE_UNROLL
  for (int v = 0; v < kPassVecs; ++v) {
    WINTSERVE_UNROLL
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      x[v][slot] = hn::LoadU(d, weighted + slot * kTileColumns + v * kLanes);
    }
    WINTSERVE_UNROLL
    for (int s = 0; s < kScales; ++s) {
      half_scale[v][s] =
          hn::Mul(hn::Set(d, 0.5f), hn::LoadU(d, scales + s * kTileColumns + v * kLanes));
      least[v][s] = hn::Set(d, kInfinity);
    }
  }
  for (int byte = 0; byte < kNumBytes; ++byte) {
    const float* codeword = codebook.vectors()[byte].data();
    const V norm = hn::Set(d, norms[byte]);
    V product[kPassVecs];
    WINTSERVE_UNROLL
    for (int v = 0; v < kPassVecs; ++v) product[v] = hn::Mul(x[v][0], hn::Set(d, codeword[0]));
    WINTSERVE_UNROLL
    for (int slot = 1; slot < kWeightsOfByte; ++slot) {
      const V value = hn::Set(d, codeword[slot]);
      WINTSERVE_UNROLL
      for (int v = 0; v < kPassVecs; ++v) {
        product[v] = hn::MulAdd(x[v][slot], value, product[v]);
      }
    }
    WINTSERVE_UNROLL
    for (int s = 0; s < kScales; ++s) {
      WINTSERVE_UNROLL
      for (int v = 0; v < kPassVecs; ++v) {
        least[v][s] = hn::Min(least[v][s], hn::MulSub(half_scale[v][s], norm, product[v]));
      }
    }
  }
  WINTSERVE_UNROLL
  for (int v = 0; v < kPassVecs; ++v) {
    WINTSERVE_UNROLL
    for (int s = 0; s < kScales; ++s) {
      float* sum = costs + s * kTileColumns + v * kLanes;
      hn::StoreU(hn::Add(hn::LoadU(d, sum), least[v][s]), d, sum);
    }
  }
}

void SumLeastCostsImpl(const SearchRows& group, int num_scales, const float* scales, float* costs) {
  std::fill_n(costs, num_scales * kTileColumns, 0.0f);
  for (int i = 0; i < kGroupBytes; ++i) {
    const float* weighted = group.weighted + i * kWeightsOfByte * kTileColumns;
    const float* norms = group.norms->Row(group.first_byte_row + i);
    for (int column = 0; column < kTileColumns; column += kPassVecs * kLanes) {
      ForScales(num_scales, [&](int s, auto count) {
        const int offset = s * kTileColumns + column;
        AddLeastCosts<decltype(count)::value>(*group.codebook, weighted + column, norms,
                                              scales + offset, costs + offset);
      });
    }
  }
}

// Four weights of one column, where lanes are codewords.
class ByteSearch {
 public:
  // weighted: the first of four weights, kTileColumns apart; norms [256].
  ByteSearch(const Codebook& codebook, const float* weighted, const float* norms)
      : codebook_(codebook), norms_(norms) {
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      x_[slot] = hn::Set(D(), weighted[slot * kTileColumns]);
    }
  }

  V Norm(int byte) const { return hn::LoadU(D(), norms_ + byte); }

  V Product(int byte) const {
    const D d;
    V product = hn::Mul(x_[0], hn::Load(d, &codebook_.slots()[0][byte]));
    WINTSERVE_UNROLL
    for (int slot = 1; slot < kWeightsOfByte; ++slot) {
      product = hn::MulAdd(x_[slot], hn::Load(d, &codebook_.slots()[slot][byte]), product);
    }
    return product;
  }

 private:
  const Codebook& codebook_;
  const float* norms_;
  V x_[kWeightsOfByte];
};

template <int kScales>
HWY_NOINLINE void AddLeastCostsOfColumn(const ByteSearch& search, const float* scales,
                                        float* costs) {
  const D d;
  V half_scale[kScales];
  V least[kScales];
  WINTSERVE_UNROLL
  for (int s = 0; s < kScales; ++s) {
    half_scale[s] = hn::Set(d, 0.5f * scales[s]);
    least[s] = hn::Set(d, kInfinity);
  }
  for (int byte = 0; byte < kNumBytes; byte += kLanes) {
    const V norm = search.Norm(byte);
    const V product = search.Product(byte);
    WINTSERVE_UNROLL
    for (int s = 0; s < kScales; ++s) {
      least[s] = hn::Min(least[s], hn::MulSub(half_scale[s], norm, product));
    }
  }
  WINTSERVE_UNROLL
  for (int s = 0; s < kScales; ++s) costs[s] += hn::GetLane(hn::MinOfLanes(d, least[s]));
}

void SumLeastCostsOfColumnImpl(const SearchRows& group, int column, int num_scales,
                               const float* scales, float* costs) {
  std::fill_n(costs, num_scales, 0.0f);
  for (int i = 0; i < kGroupBytes; ++i) {
    const ByteSearch search(*group.codebook,
                            group.weighted + i * kWeightsOfByte * kTileColumns + column,
                            group.norms->Row(group.first_byte_row + i));
    ForScales(num_scales, [&](int s, auto count) {
      AddLeastCostsOfColumn<decltype(count)::value>(search, scales + s, costs + s);
    });
  }
}

uint8_t FindByte(const ByteSearch& search, float scale) {
  const D d;
  const hn::RebindToSigned<D> di;
  const V half_scale = hn::Set(d, 0.5f * scale);
  V least = hn::Set(d, kInfinity);
  auto bytes = hn::Iota(di, 0);
  auto best = bytes;
  for (int byte = 0; byte < kNumBytes; byte += kLanes) {
    const V cost = hn::MulSub(half_scale, search.Norm(byte), search.Product(byte));
    const auto is_less = hn::Lt(cost, least);
    least = hn::Min(cost, least);
    best = hn::IfThenElse(hn::RebindMask(di, is_less), bytes, best);
    bytes = hn::Add(bytes, hn::Set(di, kLanes));
  }
  const V least_of_all = hn::MinOfLanes(d, least);
  const auto candidates =
      hn::IfThenElse(hn::RebindMask(di, hn::Eq(least, least_of_all)), best, hn::Set(di, kNumBytes));
  return static_cast<uint8_t>(hn::GetLane(hn::MinOfLanes(di, candidates)));
}

void FindBytesImpl(const SearchRows& group, int column, float scale, uint8_t* bytes) {
  for (int i = 0; i < kGroupBytes; ++i) {
    const ByteSearch search(*group.codebook,
                            group.weighted + i * kWeightsOfByte * kTileColumns + column,
                            group.norms->Row(group.first_byte_row + i));
    bytes[i] = FindByte(search, scale);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::quantizer
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::quantizer {

HWY_EXPORT(SumLeastCostsImpl);
HWY_EXPORT(SumLeastCostsOfColumnImpl);
HWY_EXPORT(FindBytesImpl);

NormTable::NormTable(const Codebook& codebook, std::span<const float> importance)
    : stride_(importance.empty() ? 0 : kNumBytes) {
  const int64_t num_rows =
      importance.empty() ? 1 : static_cast<int64_t>(importance.size()) / kWeightsOfByte;
  norms_.resize(num_rows * kNumBytes);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int slot = 0; slot < kWeightsOfByte; ++slot) {
      const float h = importance.empty() ? 1.0f : importance[row * kWeightsOfByte + slot];
      const float* values = codebook.slots()[slot].data();
      float* norms = &norms_[row * kNumBytes];
      for (int byte = 0; byte < kNumBytes; ++byte) norms[byte] += h * (values[byte] * values[byte]);
    }
  }
}

void SumLeastCosts(const SearchRows& group, int num_scales, const float* scales, float* costs) {
  HWY_DYNAMIC_DISPATCH(SumLeastCostsImpl)(group, num_scales, scales, costs);
}

void SumLeastCostsOfColumn(const SearchRows& group, int column, int num_scales, const float* scales,
                           float* costs) {
  HWY_DYNAMIC_DISPATCH(SumLeastCostsOfColumnImpl)(group, column, num_scales, scales, costs);
}

void FindBytes(const SearchRows& group, int column, float scale, uint8_t* bytes) {
  HWY_DYNAMIC_DISPATCH(FindBytesImpl)(group, column, scale, bytes);
}

}  // namespace wintserve::quantizer
#endif
