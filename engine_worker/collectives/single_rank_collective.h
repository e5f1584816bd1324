// The collective of a group with one rank: nothing to exchange.
#pragma once

#include <memory>

#include "engine_worker/collectives/collective.h"

namespace wintserve {

std::unique_ptr<Collective> MakeSingleRankCollective();

}  // namespace wintserve
