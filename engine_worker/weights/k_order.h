// Tells in which order a checkpoint's WINT2 rows lie; its configuration does not say.
#pragma once

#include <cstdint>

#include "kernels/formats/matrix.h"

namespace wintserve {

// Evidence from experts, added one by one. A neuron of an expert owns a column of gate and of up,
// whose order is certain, and a row of down, whose order is the question: the norms of the three
// correlate over neurons only if the rows are read in the right order.
class KOrderVote {
 public:
  // `gate_up` [hidden, 2 * width], `down` [width, hidden], both kWint2.
  void AddExpert(const formats::HostMatrix& gate_up, const formats::HostMatrix& down);

  // Means over the experts; 0 without any.
  double natural_correlation() const;
  double mma64_correlation() const;
  // kNatural only if its correlation is larger by more than chance can explain.
  formats::KOrder Decide() const;

 private:
  double natural_sum_ = 0;
  double mma64_sum_ = 0;
  int64_t num_experts_ = 0;
  int64_t num_neurons_ = 0;
};

}  // namespace wintserve
