#include "tools/quantizer/output/matrix_bytes.h"

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"
#include "kernels/formats/wint4.h"
#include "kernels/formats/wint8.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;

template <typename Value>
std::span<const uint8_t> AsBytes(const std::vector<Value>& values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(Value)};
}

std::vector<uint16_t> ToBfloat16(const std::vector<float>& values) {
  std::vector<uint16_t> bits(values.size());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = formats::FloatToBfloat16(values[i]);
  return bits;
}

class Emitter {
 public:
  Emitter(const PlannedStep& step, TensorSink sink) : step_(step), sink_(sink) {}

  // The step's next tensor.
  template <typename Value>
  absl::Status Next(const std::vector<Value>& values) {
    CHECK(next_ < step_.tensors.size(), "{}", step_.name);
    const PlannedTensor& tensor = step_.tensors[next_++];
    const std::span<const uint8_t> bytes = AsBytes(values);
    CHECK(static_cast<int64_t>(bytes.size()) == tensor.size_bytes, "{}: {} bytes, planned {}",
          tensor.name, bytes.size(), tensor.size_bytes);
    return sink_(tensor, bytes);
  }

 private:
  const PlannedStep& step_;
  const TensorSink sink_;
  size_t next_ = 0;
};

WeightFormat FormatOf(const PlannedStep& step) {
  if (const auto quantized = QuantizedFormat(step.format)) return *quantized;
  return step.tensors.front().type == TensorType::kF32 ? WeightFormat::kFloat32
                                                       : WeightFormat::kBfloat16;
}

}  // namespace

absl::Status EmitMatrix(const PlannedStep& step, const HostMatrix& matrix, TensorSink sink) {
  CHECK(matrix.format == FormatOf(step) && matrix.k == step.k && matrix.n == step.n,
        "{}: format={} k={} n={}", step.name, static_cast<int>(matrix.format), matrix.k, matrix.n);
  Emitter emit(step, sink);
  switch (matrix.format) {
    case WeightFormat::kFloat32:
      return emit.Next(matrix.values_f32);
    case WeightFormat::kBfloat16:
      return emit.Next(matrix.values_bf16);
    case WeightFormat::kWint8:
      RETURN_IF_ERROR(emit.Next(formats::PackWint8(matrix)));
      return emit.Next(ToBfloat16(matrix.channel_scale));
    case WeightFormat::kWint4:
      RETURN_IF_ERROR(emit.Next(formats::PackWint4(matrix)));
      return emit.Next(ToBfloat16(matrix.channel_scale));
    case WeightFormat::kWint2:
      RETURN_IF_ERROR(emit.Next(matrix.codes_u8));
      RETURN_IF_ERROR(emit.Next(formats::PackWint2LocalScale(matrix)));
      RETURN_IF_ERROR(emit.Next(ToBfloat16(matrix.channel_scale)));
      RETURN_IF_ERROR(emit.Next(matrix.code_scale));
      return emit.Next(matrix.code_zp);
  }
  CHECK(false, "format={}", static_cast<int>(matrix.format));
}

absl::Status EmitVector(const PlannedStep& step, const std::vector<float>& values,
                        TensorSink sink) {
  Emitter emit(step, sink);
  if (step.tensors.front().type == TensorType::kF32) return emit.Next(values);
  return emit.Next(ToBfloat16(values));
}

}  // namespace wintserve::quantizer
