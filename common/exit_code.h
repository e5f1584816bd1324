// Exit codes of every process (sysexits.h where one fits), so that a supervisor can tell what to
// do.
#pragma once

namespace wintserve {

enum ExitCode : int {
  kExitOk = 0,            // also after SIGINT or SIGTERM
  kExitUsage = 64,        // a flag
  kExitCheckpoint = 66,   // a missing, corrupt or inconsistent model file
  kExitUnavailable = 69,  // a port or device
  kExitInternal = 70,     // our fault, or a child that died
  kExitCrashLoop = 71,
  kExitOutput = 73,  // what was to be written is there already, is of another run or has no space
  kExitDrainTimeout = 75,  // streams were cut
  // The API server to the launcher: it has given up before it was ever ready, for what it would
  // find again. At a first start the launcher makes it kExitInternal.
  kExitNeverReady = 76,
  kExitConfigFile = 78,  // the YAML file
};

}  // namespace wintserve
