#pragma once

#include <cstdint>
#include <string>

namespace moe::cuda {

// Why no kernel can run in this process; empty when one can.
std::string why_no_gpu();

// Whether launches into the stream are being captured into a CUDA graph.
bool is_capturing(void* stream);

// `count` counters that are 0, kept until the process ends. May be called while a stream is being
// captured; waits for the GPU.
uint32_t* new_counters(int device, int64_t count);

}  // namespace moe::cuda
