// Tells in which order a checkpoint's WINT2 rows lie; its configuration does not say.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/formats/matrix.h"

namespace wintserve {

// Means of Pearson correlations under both readings of the rows. The rows never leave their
// 64-group, so that differences between groups tell nothing and are taken out before.
struct KOrderCorrelations {
  double mma64 = 0;
  double natural = 0;
  int64_t num_values = 0;  // that the means are over, all correlations together

  // How much the natural order is ahead, in deviations of what chance does: correlations of
  // unrelated values are off 0 by one in sqrt(num_values).
  double LeadOfNatural() const;
};

struct KOrderEvidence {
  // A neuron of an expert owns a column of gate and of up, whose order is certain, and a row of
  // down, whose order is the question: norms of the columns with those of the rows.
  KOrderCorrelations neurons;
  // A hidden dimension owns a row of every gate_up, whose order is the question, and a row of the
  // layer's router, which is never permuted: norms of one with those of the other.
  KOrderCorrelations hidden;
  int num_experts = 0;
  int num_layers = 0;

  // The first check where it says more than chance does (four deviations), else the second, else
  // mma64, as the released files are.
  formats::KOrder Decide() const;
  // Whether a check says more than chance does; if not, Decide() is the default.
  bool is_conclusive() const;
  // Both say more than chance does, and not the same.
  bool contradicts_itself() const;
  // "mma64 (norms of neurons correlate 0.96 as mma64, 0.01 as natural, those of hidden dimensions
  // 0.41 and 0.02; 64 experts of 6 layers)"; "mma64 by default (..." where that tells nothing.
  std::string Describe() const;
};

// Collects evidence layer by layer. Threading: one thread.
class KOrderVote {
 public:
  class Layer {
   public:
    // `gate_up` [hidden, 2 * width], `down` [width, hidden], both kWint2.
    void AddExpert(const formats::HostMatrix& gate_up, const formats::HostMatrix& down);

   private:
    friend class KOrderVote;
    std::vector<double> router_norms_;  // [hidden]
    std::vector<double> row_norms_;     // [hidden] of gate_up in stored order, summed over experts
    KOrderCorrelations neurons_;        // sums over experts
    int num_experts_ = 0;
  };

  // `router` [hidden, experts], kFloat32.
  Layer BeginLayer(const formats::HostMatrix& router) const;
  void EndLayer(const Layer& layer);

  KOrderEvidence evidence() const;

 private:
  KOrderEvidence sums_;
};

}  // namespace wintserve
