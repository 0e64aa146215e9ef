// Small kernels, right and wrong ones, for test_cuda_simulator.py: what does the simulator say?
// probe <case> <order>, where the order is that of simulator/fiber.hpp.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/launch.hpp"
#include "cuda/radix.hpp"

using namespace moe::cuda;

namespace {

struct Results {
  int* out;
};

// Every thread reads what its neighbour wrote, with and without waiting for it.
template <bool kWaits>
struct Neighbour {
  using Args = Results;
  static constexpr const char* name = "neighbour";
  static constexpr int kThreads = 64, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args& args) {
    int* shared = block.template shared<int>();
    shared[block.thread()] = 100 + block.thread();
    if (kWaits) block.sync();
    args.out[block.thread()] = shared[(block.thread() + 1) % block.threads()];
  }
};

struct HalfWaits {
  using Args = Results;
  static constexpr const char* name = "half_waits";
  static constexpr int kThreads = 64, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args&) {
    if (block.thread() < 48) block.sync();
  }
};

struct PartWays {
  using Args = Results;
  static constexpr const char* name = "part_ways";
  static constexpr int kThreads = 64, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args& args) {
    args.out[0] = block.lane() < 7 ? static_cast<int>(block.ballot(true)) : block.shuffle(1, 0);
  }
};

struct Fails {
  using Args = Results;
  static constexpr const char* name = "fails";
  static constexpr int kThreads = 64, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args&) {
    block.sync();
    if (block.thread() == 3) throw std::runtime_error("thread 3 fails");
    block.sync();
  }
};

// Reductions over runs of 1, 2, ... 32 threads; six numbers a thread.
struct Reductions {
  using Args = Results;
  static constexpr const char* name = "reductions";
  static constexpr int kThreads = 64, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args& args) {
    const int value = block.thread() * 7 % 32;
    for (int lanes = 1, step = 0; lanes <= 32; lanes *= 2, ++step) {
      int* out = args.out + (block.thread() * 6 + step) * 3;
      out[0] = sum_lanes(block, value, lanes);
      out[1] = static_cast<int>(max_lanes(block, static_cast<uint64_t>(value) << 40, lanes) >> 40);
      out[2] = exclusive_lanes(block, value, lanes);
    }
  }
};

// Teams of two blocks number themselves; the last team to end adds the numbers up.
struct Teams {
  using Args = Results;
  static constexpr const char* name = "teams";
  static constexpr int kThreads = 32, kBlocks = 1;
  template <class Block>
  static void run(const Block& block, const Args& args) {
    const int64_t index = block.team() * block.team_blocks() + block.rank();
    if (block.thread() == 0) args.out[1 + index] = 10 * static_cast<int>(index);
    block.sync_team();
    if (block.rank() != 0) return;
    if (!block.is_last_of(reinterpret_cast<uint32_t*>(args.out), block.teams())) return;
    int total = 0;
    for (int64_t i = 0; i < block.teams() * block.team_blocks(); ++i) total += args.out[1 + i];
    if (block.thread() == 0) args.out[20] = total;
  }
};

template <class Kernel>
void run(int64_t teams, int64_t team_size, int threads, int64_t shared_bytes, int print) {
  int out[64 * 18] = {};
  launch<Kernel, Team::cluster>({0, nullptr}, {teams, team_size, threads, shared_bytes}, {out});
  for (int i = 0; i < print; ++i) std::printf("%d ", out[i]);
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1];
  simulated_gpu.order = static_cast<Order>(std::atoi(argv[2]));
  try {
    if (what == "race") run<Neighbour<false>>(1, 1, 64, 256, 64);
    if (what == "no race") run<Neighbour<true>>(1, 1, 64, 256, 64);
    if (what == "half waits") run<HalfWaits>(1, 1, 64, 0, 0);
    if (what == "part ways") run<PartWays>(1, 1, 64, 0, 0);
    if (what == "fails") run<Fails>(1, 1, 64, 0, 0);
    if (what == "reductions") run<Reductions>(1, 1, 64, 0, 64 * 18);
    if (what == "teams") run<Teams>(3, 2, 32, 0, 21);
    if (what == "odd threads") run<Neighbour<true>>(1, 1, 40, 256, 0);
    if (what == "many threads") run<Neighbour<true>>(1, 1, 128, 256, 0);
    if (what == "much memory") run<Neighbour<true>>(1, 1, 64, 1 << 20, 0);
    if (what == "many blocks") run<Neighbour<true>>(int64_t{1} << 31, 1, 64, 256, 0);
  } catch (const std::exception& error) {
    std::printf("error: %s", error.what());
  }
}
