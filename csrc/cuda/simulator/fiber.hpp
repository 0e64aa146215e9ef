// Threads of a simulated GPU: fibers of one host thread, which run until they wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace moe::cuda {

// The order in which fibers run between two barriers. A GPU promises none, so that results which
// depend on it are faults.
enum class Order : int { forward = 0, backward = 1, shuffled = 2 };

class Fibers;

// A place where `expected` fibers meet. Those that meet must do the same thing (`what`).
class Barrier {
 public:
  Barrier(Fibers& fibers, int expected, std::string name);
  void meet(const char* what);
  // How often all have met; what was exchanged at one meeting may be overwritten at the one after
  // the next, not before.
  uint64_t meetings() const { return meetings_; }

 private:
  friend class Fibers;
  Fibers& fibers_;
  const int expected_;
  const std::string name_;
  const char* what_ = nullptr;
  uint64_t meetings_ = 0;
  std::vector<int> waiting_;
};

// Runs `body(i)` for i in [0, count), each in a fiber. Throws what a body throws, and a
// std::logic_error when fibers wait for one another for ever.
class Fibers {
 public:
  Fibers(int count, Order order, uint64_t seed);
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  void run(const std::function<void(int)>& body);

 private:
  friend class Barrier;
  struct Fiber;
  static void enter();
  void suspend();                       // the running fiber waits
  void wake(std::vector<int>& fibers);  // in the order of the simulation
  void switch_to(int next);             // count_ is the scheduler itself
  [[noreturn]] void report_deadlock() const;

  const int count_;
  const Order order_;
  uint64_t random_;
  std::unique_ptr<Fiber[]> fibers_;
  std::deque<int> ready_;
  int running_;
  int finished_ = 0;
  std::exception_ptr error_;
  std::vector<Barrier*> barriers_;
  const std::function<void(int)>* body_ = nullptr;
};

}  // namespace moe::cuda
