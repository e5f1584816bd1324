#include "engine_worker/weights/matrix_loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"
#include "kernels/formats/wint4.h"
#include "kernels/formats/wint8.h"

namespace wintserve {
namespace {

using formats::HostMatrix;
using formats::MatrixSlice;
using formats::WeightFormat;

// Exact, subnormals included: 2^112 moves the exponent bias from half's 15 to float's 127.
float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  const bool is_finite = (half & 0x7C00) != 0x7C00;
  const uint32_t bits = is_finite
                            ? std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f)
                            : magnitude | 0x7F800000;
  return std::bit_cast<float>(bits | sign);
}

// Element readers: tensors are not aligned, so every element is copied out.
template <typename Stored>
Stored LoadElement(const uint8_t* data, int64_t index) {
  Stored value;
  std::memcpy(&value, data + index * sizeof(Stored), sizeof(Stored));
  return value;
}
struct ReadBfloat16Bits {
  uint16_t operator()(const uint8_t* data, int64_t i) const {
    return LoadElement<uint16_t>(data, i);
  }
};
struct ReadBfloat16 {
  float operator()(const uint8_t* data, int64_t i) const {
    return formats::Bfloat16ToFloat(LoadElement<uint16_t>(data, i));
  }
};
struct ReadHalf {
  float operator()(const uint8_t* data, int64_t i) const {
    return HalfToFloat(LoadElement<uint16_t>(data, i));
  }
};
struct ReadFloat32 {
  float operator()(const uint8_t* data, int64_t i) const { return LoadElement<float>(data, i); }
};
struct ReadFloat64 {
  float operator()(const uint8_t* data, int64_t i) const {
    return static_cast<float>(LoadElement<double>(data, i));
  }
};

template <typename Function>
void WithFloatReader(TensorType type, Function&& function) {
  switch (type) {
    case TensorType::kBF16:
      return function(ReadBfloat16());
    case TensorType::kF16:
      return function(ReadHalf());
    case TensorType::kF32:
      return function(ReadFloat32());
    case TensorType::kF64:
      return function(ReadFloat64());
    default:
      CHECK(false, "type={}", TensorTypeName(type));
  }
}

// Copies `slice` of a plain tensor to the columns of `target` [slice rows, target_columns].
template <typename Reader, typename Value>
void CopyPlain(const uint8_t* data, const StoredMatrix& stored, const MatrixSlice& slice,
               int64_t first_column, int64_t target_columns, Reader read, Value* target) {
  if (!stored.is_out_in) {
    for (int64_t k = slice.k_begin; k < slice.k_end; ++k) {
      Value* row = target + (k - slice.k_begin) * target_columns + first_column;
      for (int64_t n = slice.n_begin; n < slice.n_end; ++n) {
        row[n - slice.n_begin] = read(data, k * stored.n + n);
      }
    }
    return;
  }
  // By way of a block in the L1 cache: rows of the target are far apart and evict each other.
  constexpr int64_t kBlockColumns = 32;
  constexpr int64_t kBlockRows = 64;
  std::array<std::array<Value, kBlockColumns>, kBlockRows> block;
  for (int64_t n0 = slice.n_begin; n0 < slice.n_end; n0 += kBlockColumns) {
    const int64_t num_columns = std::min(kBlockColumns, slice.n_end - n0);
    for (int64_t k0 = slice.k_begin; k0 < slice.k_end; k0 += kBlockRows) {
      const int64_t num_rows = std::min(kBlockRows, slice.k_end - k0);
      for (int64_t i = 0; i < num_columns; ++i) {
        for (int64_t j = 0; j < num_rows; ++j) {
          block[j][i] = read(data, (n0 + i) * stored.k + k0 + j);
        }
      }
      Value* first =
          target + (k0 - slice.k_begin) * target_columns + first_column + n0 - slice.n_begin;
      for (int64_t j = 0; j < num_rows; ++j) {
        std::memcpy(first + j * target_columns, block[j].data(), num_columns * sizeof(Value));
      }
    }
  }
}

// A tensor of a matrix; there by the caller's contract.
struct Tensor {
  std::string name;
  const TensorSet::Entry* entry;

  const uint8_t* bytes() const { return entry->view->data.data(); }
  absl::Status Corrupt(std::string_view message) const {
    return absl::DataLossError(
        fmt::format("{}: tensor {}: {}", entry->file->path().string(), name, message));
  }
};

Tensor Get(const TensorSet& set, const StoredMatrix& stored, const char* suffix) {
  Tensor tensor{stored.name + "." + suffix, nullptr};
  tensor.entry = set.Find(tensor.name);
  CHECK(tensor.entry != nullptr, "{}", tensor.name);
  return tensor;
}

absl::StatusOr<std::vector<float>> ReadFiniteFloats(const Tensor& tensor) {
  std::vector<float> values = ReadFloats(*tensor.entry->view);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      return tensor.Corrupt(
          fmt::format("found {} at index {}, expected finite numbers", values[i], i));
    }
  }
  return values;
}

// Scales multiply as bf16, whatever type stores them.
absl::StatusOr<std::vector<float>> ReadScales(const Tensor& tensor) {
  ASSIGN_OR_RETURN(std::vector<float> scales, ReadFiniteFloats(tensor));
  for (float& scale : scales) scale = formats::RoundToBfloat16(scale);
  return scales;
}

absl::Status LoadWint2(const TensorSet& set, const StoredMatrix& stored, const MatrixSlice& slice,
                       int64_t first_column, HostMatrix& matrix) {
  const Tensor code_scale_tensor = Get(set, stored, "code_scale");
  ASSIGN_OR_RETURN(const std::vector<float> super_scale,
                   ReadScales(Get(set, stored, "super_scales")));
  ASSIGN_OR_RETURN(const std::vector<float> code_scale, ReadFiniteFloats(code_scale_tensor));
  ASSIGN_OR_RETURN(const std::vector<float> code_zp, ReadFiniteFloats(Get(set, stored, "code_zp")));
  // Every code of the column must fit 32 bits, or decoding it would be undefined.
  constexpr float kMaxCode = 0x1p30f;
  for (size_t i = 0; i < code_scale.size(); ++i) {
    if (255 * std::fabs(code_scale[i]) + std::fabs(code_zp[i]) > kMaxCode) {
      return code_scale_tensor.Corrupt(
          fmt::format("found {} (code_zp {}) at index {}, expected codes within 2^30",
                      code_scale[i], code_zp[i], i));
    }
  }
  formats::UnpackWint2({stored.k, stored.n, Get(set, stored, "quant_weight").bytes(),
                        Get(set, stored, "weight_scale").bytes(), super_scale.data(),
                        code_scale.data(), code_zp.data()},
                       slice, first_column, matrix);
  return absl::OkStatus();
}

absl::Status LoadPart(const TensorSet& set, const StoredMatrix& stored, const MatrixSlice& slice,
                      int64_t first_column, HostMatrix& matrix) {
  switch (matrix.format) {
    case WeightFormat::kBfloat16:
      CopyPlain(Get(set, stored, "weight").bytes(), stored, slice, first_column, matrix.n,
                ReadBfloat16Bits(), matrix.values_bf16.data());
      return absl::OkStatus();
    case WeightFormat::kFloat32: {
      const Tensor weight = Get(set, stored, "weight");
      WithFloatReader(weight.entry->view->type, [&](auto reader) {
        CopyPlain(weight.bytes(), stored, slice, first_column, matrix.n, reader,
                  matrix.values_f32.data());
      });
      return absl::OkStatus();
    }
    case WeightFormat::kWint8: {
      ASSIGN_OR_RETURN(const std::vector<float> scale,
                       ReadScales(Get(set, stored, "weight_scale")));
      formats::UnpackWint8(
          {stored.k, stored.n, Get(set, stored, "quant_weight").bytes(), scale.data()}, slice,
          first_column, matrix);
      return absl::OkStatus();
    }
    case WeightFormat::kWint4: {
      ASSIGN_OR_RETURN(const std::vector<float> scale,
                       ReadScales(Get(set, stored, "weight_scale")));
      formats::UnpackWint4(
          {stored.k, stored.n, Get(set, stored, "quant_weight").bytes(), scale.data()}, slice,
          first_column, matrix);
      return absl::OkStatus();
    }
    case WeightFormat::kWint2:
      return LoadWint2(set, stored, slice, first_column, matrix);
  }
  CHECK(false, "format={}", static_cast<int>(matrix.format));
}

WeightFormat CanonicalFormat(const TensorSet& set, const LogicalMatrix& matrix, bool as_float32) {
  if (const auto quantized = QuantizedFormat(matrix.parts.front().stored.format)) return *quantized;
  const bool all_bf16 =
      std::all_of(matrix.parts.begin(), matrix.parts.end(), [&](const MatrixPart& part) {
        return Get(set, part.stored, "weight").entry->view->type == TensorType::kBF16;
      });
  return all_bf16 && !as_float32 ? WeightFormat::kBfloat16 : WeightFormat::kFloat32;
}

int64_t HostBytes(WeightFormat format, int64_t k, int64_t n) {
  switch (format) {
    case WeightFormat::kFloat32:
      return k * n * 4;
    case WeightFormat::kBfloat16:
      return k * n * 2;
    case WeightFormat::kWint8:
    case WeightFormat::kWint4:
      return k * n + n * 4;
    case WeightFormat::kWint2:
      return k / 4 * n + k / formats::kWint2GroupSize * n + 3 * n * 4;
  }
  CHECK(false, "format={}", static_cast<int>(format));
}

}  // namespace

std::vector<TensorType> FloatTensorTypes() {
  return {TensorType::kBF16, TensorType::kF16, TensorType::kF32, TensorType::kF64};
}

std::vector<ExpectedTensor> ExpectedTensors(const StoredMatrix& stored) {
  const std::vector<TensorType> bytes = {TensorType::kI8, TensorType::kU8};
  const auto [k, n] = std::pair(stored.k, stored.n);
  const auto name = [&](const char* suffix) { return stored.name + "." + suffix; };
  const ExpectedTensor channel_scale = {name("weight_scale"), FloatTensorTypes(), {{n}}};
  switch (stored.format) {
    case StoredFormat::kPlain:
      return {{name("weight"),
               FloatTensorTypes(),
               {stored.is_out_in ? std::vector{n, k} : std::vector{k, n}}}};
    case StoredFormat::kWint8:
      return {{name("quant_weight"), bytes, {{n, k}}}, channel_scale};
    case StoredFormat::kWint4:
      return {{name("quant_weight"), bytes, {{n / 2, k}}}, channel_scale};
    case StoredFormat::kWint2:
      return {{name("quant_weight"), bytes, {{k / 4, n}}},
              {name("weight_scale"), bytes, {{k / 128, n}}},
              {name("super_scales"), FloatTensorTypes(), {{n}}},
              {name("code_scale"), {TensorType::kF32}, {{n}}},
              {name("code_zp"), {TensorType::kF32}, {{n}}}};
  }
  CHECK(false, "format={}", static_cast<int>(stored.format));
}

std::vector<float> ReadFloats(const TensorView& view) {
  std::vector<float> values(view.data.size() / TensorTypeBytes(view.type));
  WithFloatReader(view.type, [&](auto read) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = read(view.data.data(), i);
  });
  return values;
}

MatrixBytes BytesOfSlice(const TensorSet& set, const LogicalMatrix& matrix, int rank,
                         int world_size, bool as_float32) {
  MatrixBytes bytes;
  int64_t num_rows = 0, num_columns = 0;
  for (const MatrixPart& part : matrix.parts) {
    const MatrixSlice slice = SliceOf(part, matrix.split, rank, world_size);
    num_rows = slice.num_rows();
    num_columns += slice.num_columns();
    const double share = static_cast<double>(slice.num_rows() * slice.num_columns()) /
                         static_cast<double>(part.stored.k * part.stored.n);
    int64_t whole = 0;
    for (const ExpectedTensor& expected : ExpectedTensors(part.stored)) {
      const TensorSet::Entry* entry = set.Find(expected.name);
      CHECK(entry != nullptr, "{}", expected.name);
      whole += static_cast<int64_t>(entry->view->data.size());
    }
    bytes.on_disk += static_cast<int64_t>(share * static_cast<double>(whole));
  }
  bytes.on_host = HostBytes(CanonicalFormat(set, matrix, as_float32), num_rows, num_columns);
  return bytes;
}

absl::StatusOr<HostMatrix> LoadMatrixSlice(const TensorSet& set, const LogicalMatrix& matrix,
                                           int rank, int world_size, formats::KOrder k_order,
                                           bool as_float32) {
  std::vector<MatrixSlice> slices;
  int64_t num_columns = 0;
  for (const MatrixPart& part : matrix.parts) {
    slices.push_back(SliceOf(part, matrix.split, rank, world_size));
    num_columns += slices.back().num_columns();
  }
  HostMatrix loaded = formats::MakeHostMatrix(CanonicalFormat(set, matrix, as_float32),
                                              slices.front().num_rows(), num_columns);
  loaded.k_order = k_order;
  int64_t first_column = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    RETURN_IF_ERROR(LoadPart(set, matrix.parts[i].stored, slices[i], first_column, loaded));
    first_column += slices[i].num_columns();
  }
  for (const MatrixPart& part : matrix.parts) {
    for (const ExpectedTensor& expected : ExpectedTensors(part.stored)) {
      DropPages(set.Find(expected.name)->view->data);
    }
  }
  return loaded;
}

}  // namespace wintserve
