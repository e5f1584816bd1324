// Everything that one seed decides about a run, but for the events themselves.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "api_server/scheduler/scheduler.h"

namespace wintserve::simulation {

enum class WorkerFailure { kKilled, kCrashed, kHangs };

// Of the API server, on purpose, to see that the checks find it.
enum class Mistake {
  kNone,
  kFenceOnStreamDrop,  // a rank whose stream has dropped counts as fenced
  kFenceOnFirst,       // so do all ranks once one of them is
  kTrustCrashes,       // the KV of a rank that crashed is trusted
  kNoDistrust,         // the cache manager does not hear of bad steps
  kForgetDistrust,     // nor does it after its session broke
  kTakeLateResults,    // a result counts although the group has been given up
  kTrustAdopted,       // a pool is trusted that a rank has spoilt without an API server
  kDistrustByNumber,   // steps are told by their numbers, which leap from server to server
  kNoFenceOfAdopted,   // what the session before held stays quarantined
};

struct SimulationConfig {
  uint64_t seed = 0;

  SchedulerConfig scheduler;
  int num_ranks = 1;
  int max_sequence_tokens = 0;
  int num_host_slots = 0;

  // Load.
  int num_requests = 0;
  int64_t mean_interarrival_us = 0;
  int num_documents = 0;  // that prompts begin with
  int num_tenants = 1;
  int num_salts = 1;
  int max_prompt_tokens = 0;
  int max_answer_tokens = 0;
  double eos_chance = 0;  // of a token
  double deadline_chance = 0;
  double cancel_chance = 0;
  double bypass_chance = 0;  // of a request that must not be matched

  // Speed. Ranks take step_us + a part for every token, times a random factor.
  int64_t step_us = 0;
  int64_t token_us = 0;
  int64_t cache_latency_us = 0;   // mean, one way
  double cache_stall_chance = 0;  // a message takes 100 times as long
  int64_t worker_latency_us = 0;  // mean, one way

  // Faults of the cache manager.
  int num_drops = 0;   // of the session
  int num_deaths = 0;  // of the process
  int num_flushes = 0;
  int64_t grace_us = 0;  // pins and leases outlive a session by this much
  int64_t max_outage_us = 0;

  int num_server_deaths = 0;  // of the API server; another one takes the pool over

  // Faults of engine workers.
  int num_worker_kills = 0;      // from outside: their KV is trusted
  int num_worker_crashes = 0;    // their own fault: it is not
  int num_worker_hangs = 0;      // until they are killed
  double abort_hang_chance = 0;  // of a survivor that is told to leave its group
  int64_t max_reap_us = 0;       // a dying process may write to memory for this long
  int64_t max_restart_us = 0;    // until its replacement is attached
  int64_t abort_timeout_us = 0;  // then a rank that has not left its group is killed
  int64_t step_deadline_us = 0;  // then a rank is found to hang
  uint64_t num_bad_steps = 1;    // newest steps that a rank that crashed did wrong, at most
  double isolation_chance = 0;   // of a request in flight when a rank crashes
  // Not random: what happens after that many events.
  struct PlannedFailure {
    uint64_t event = 0;
    int rank = 0;
    WorkerFailure failure = WorkerFailure::kKilled;
  };
  std::vector<PlannedFailure> planned_failures = {};
  std::optional<uint64_t> cache_dies_at_event = {};
  std::optional<uint64_t> server_dies_at_event = {};
  Mistake mistake = Mistake::kNone;

  int64_t arrivals_us() const { return num_requests * mean_interarrival_us; }
  std::string ToString() const;
};

// The same seed always gives the same configuration.
SimulationConfig RandomConfig(uint64_t seed);

}  // namespace wintserve::simulation
