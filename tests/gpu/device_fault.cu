// A device fault on demand, in any program that uses CUDA: with CUDA_INJECTION64_PATH naming this
// library, the driver loads it, and SIGUSR2 makes a kernel of the process write to an address that
// is nobody's. From then on every call for that device fails as after any other illegal access.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <semaphore.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <thread>

namespace {

sem_t requested;

__global__ void WriteTo(volatile int* address) { *address = 1; }

void OnSignal(int) { sem_post(&requested); }

// Whether the program itself uses it: to ask the runtime would create what it asks for.
bool IsInUse(int device) {
  using GetState = decltype(&cuDevicePrimaryCtxGetState);
  static void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  static const auto get_state =
      driver == nullptr ? nullptr
                        : reinterpret_cast<GetState>(dlsym(driver, "cuDevicePrimaryCtxGetState"));
  unsigned flags = 0;
  int is_active = 0;
  return get_state != nullptr && get_state(device, &flags, &is_active) == CUDA_SUCCESS &&
         is_active != 0;
}

void FaultOn(int device) {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaSetDevice(device);
  // Not behind what the program has queued.
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) {
    WriteTo<<<1, 1, 0, stream>>>(reinterpret_cast<int*>(16));
    error = cudaGetLastError();
  }
  std::fprintf(stderr, "device_fault: process %d, device %d: %s\n", static_cast<int>(getpid()),
               device, error == cudaSuccess ? "launched" : cudaGetErrorString(error));
}

void FaultOnRequest() {
  while (true) {
    while (sem_wait(&requested) != 0) {
    }
    int num_devices = 0;
    if (cudaGetDeviceCount(&num_devices) != cudaSuccess) continue;
    for (int device = 0; device < num_devices; ++device) {
      if (IsInUse(device)) FaultOn(device);
    }
  }
}

}  // namespace

// The driver calls it once, when the program initializes CUDA.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  sem_init(&requested, 0, 0);
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR2, &action, nullptr);
  std::thread(FaultOnRequest).detach();
  return 1;
}
