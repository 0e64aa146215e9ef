#pragma once

#include <string>

namespace moe::cuda {

// Why no kernel can run in this process; empty when one can.
std::string why_no_gpu();

}  // namespace moe::cuda
