// What a row of calibration counts for by the residual that its module leaves.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace wintserve::quantizer {

// The mean over `columns` of (residual + added)^2. Both [columns]; the sum of two is rounded to
// float32, as the residual that a model goes on with is.
double MeanSquareOfSum(const float* residual, const float* added, int64_t columns);

// weights[t] = v[t] / mean(v), v[t] = 1 / (mean_squares[t] + epsilon), in double precision.
//
// mean_squares [tokens]: mean over k of r_f[t, k]^2, r_f the residual of the unquantised model
// after the module whose matrices are being made. epsilon > 0: of the model's norms, which keeps a
// residual of zeros finite.
//
// The reason: the norm after the module divides the residual by sqrt(mean square + epsilon), so an
// error of the module's output counts for the rest of the model by its share of the residual. With
// equal weights the tokens with a large residual would rule every sum, above all those that
// attention rests on, such as the first of a sequence.
std::vector<float> RowWeights(std::span<const double> mean_squares, double epsilon);

}  // namespace wintserve::quantizer
