// What the host asks of the CUDA runtime, once for all kernels. The simulator has its own answers.
#include "device.hpp"

#include "launch.hpp"

#if !defined(MOE_SIMULATED)
namespace moe::cuda {

void check(cudaError_t status, const char* action, const char* kernel) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // otherwise the next call would report it again
  throw std::runtime_error(std::string("cannot ") + action + " kernel " + kernel + ": " +
                           cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "find the current GPU for", "launch");
  if (current == device) return;
  check(cudaSetDevice(device), "select the GPU of", "launch");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

Limits limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "ask the GPU about", "launch");
    return value;
  };
  Limits limits = {};
  limits.processors = ask(cudaDevAttrMultiProcessorCount);
  limits.largest_cluster = ask(cudaDevAttrComputeCapabilityMajor) >= 9 ? 8 : 1;
  limits.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return known[device] = limits;
}

bool is_capturing(void* stream) {
  if (stream == nullptr) return false;  // the legacy stream cannot be, and must not be asked
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "ask the stream of",
        "launch");
  return status != cudaStreamCaptureStatusNone;
}

uint32_t* new_counters(int device, int64_t count) {
  const DeviceGuard guard(device);
  // Allocating is no part of a capture that this or another thread has under way.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "allocate counters of", "launch");
  void* counters = nullptr;
  cudaStream_t stream = nullptr;
  const size_t bytes = static_cast<size_t>(count) * sizeof(uint32_t);
  cudaError_t status = cudaMalloc(&counters, bytes);
  if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) status = cudaMemsetAsync(counters, 0, bytes, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (stream != nullptr) (void)cudaStreamDestroy(stream);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  check(status, "allocate counters of", "launch");
  return static_cast<uint32_t*>(counters);
}

std::string why_no_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return "";
  (void)cudaGetLastError();
  if (status == cudaSuccess || status == cudaErrorNoDevice) return "no GPU is present";
  if (status == cudaErrorInsufficientDriver) {
    return "no GPU is present, or its driver is older than CUDA " +
           std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 100 / 10);
  }
  return std::string("no GPU can be used: ") + cudaGetErrorString(status);
}

}  // namespace moe::cuda
#endif
