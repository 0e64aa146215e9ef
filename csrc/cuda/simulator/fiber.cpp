#include "fiber.hpp"

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace moe::cuda {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Memory of the stacks, kept between launches. Pages are taken when they are first written.
class Stacks {
 public:
  ~Stacks() { release(); }
  // Forget what the fibers of the last launch left; those after an error never returned.
  void clean() const {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
#endif
  }
  char* of(int fiber, int count) {
    const size_t bytes = kStackBytes * static_cast<size_t>(count);
    if (bytes > bytes_) {
      release();
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
      bytes_ = bytes;
    }
    return memory_ + kStackBytes * static_cast<size_t>(fiber);
  }

 private:
  void release() {
    if (memory_ == nullptr) return;
    clean();
    munmap(memory_, bytes_);
    memory_ = nullptr;
  }
  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

thread_local Stacks stacks;
thread_local Fibers* active = nullptr;

#if defined(__SANITIZE_ADDRESS__)
// The address sanitizer wants to know the stack of the thread that runs the fibers.
struct HostStack {
  void* begin = nullptr;
  size_t bytes = 0;
  HostStack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
};
thread_local const HostStack host_stack;
#endif

}  // namespace

#if defined(__x86_64__)
// Saves what a function call keeps, and goes on where `to` once stopped. swapcontext() would do,
// at thirty times the cost: it asks the kernel for the signal mask.
extern "C" void moe_switch_stack(void** from, void* to);
asm(R"(
.text
.hidden moe_switch_stack
.globl moe_switch_stack
.type moe_switch_stack, @function
moe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moe_switch_stack, .-moe_switch_stack
)");
#endif

struct Fibers::Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  bool done = false;
  void* fake_stack = nullptr;  // of the address sanitizer
};

Barrier::Barrier(Fibers& fibers, int expected, std::string name)
    : fibers_(fibers), expected_(expected), name_(std::move(name)) {
  fibers.barriers_.push_back(this);
}

void Barrier::meet(const char* what) {
  if (waiting_.empty()) what_ = what;
  if (std::string(what_) != what) {
    throw std::logic_error("threads of " + name_ + " part ways: one is at " + what_ +
                           ", another at " + what);
  }
  waiting_.push_back(fibers_.running_);
  if (static_cast<int>(waiting_.size()) == expected_) {
    ++meetings_;
    fibers_.wake(waiting_);
  }
  fibers_.suspend();
}

Fibers::Fibers(int count, Order order, uint64_t seed)
    : count_(count),
      order_(order),
      random_(seed),
      fibers_(new Fiber[static_cast<size_t>(count) + 1]),
      running_(count) {}

Fibers::~Fibers() = default;

void Fibers::run(const std::function<void(int)>& body) {
  Fibers* const outer = std::exchange(active, this);
  body_ = &body;
  std::vector<int> all(static_cast<size_t>(count_));
  for (int i = 0; i < count_; ++i) {
    all[static_cast<size_t>(order_ == Order::backward ? count_ - 1 - i : i)] = i;
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    fiber.stack = stacks.of(i, count_);
#if defined(__x86_64__)
    // Six registers that nobody reads, the address to return to, and an odd slot for alignment.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Fibers::enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Fibers::enter, 0);
#endif
  }
  wake(all);
  while (!ready_.empty() && !error_) {
    const int next = ready_.front();
    ready_.pop_front();
    switch_to(next);
  }
  active = outer;
  stacks.clean();
  if (error_) std::rethrow_exception(error_);
  if (finished_ < count_) report_deadlock();
}

void Fibers::enter() {
  Fibers& self = *active;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  try {
    (*self.body_)(self.running_);
  } catch (...) {
    if (!self.error_) self.error_ = std::current_exception();
  }
  self.fibers_[static_cast<size_t>(self.running_)].done = true;
  ++self.finished_;
  self.suspend();
}

void Fibers::suspend() {
  if (ready_.empty() || error_) return switch_to(count_);
  const int next = ready_.front();
  ready_.pop_front();
  switch_to(next);
}

void Fibers::wake(std::vector<int>& fibers) {
  if (order_ == Order::shuffled) {
    for (size_t left = fibers.size(); left > 1; --left) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      std::swap(fibers[left - 1], fibers[(random_ >> 33) % left]);
    }
  }
  // Those that were woken go first, so that a warp gets as far ahead of the others as it can; or
  // last, so that all stay in step.
  const bool is_greedy = order_ != Order::shuffled || (random_ >> 40) % 4 != 0;
  ready_.insert(is_greedy ? ready_.begin() : ready_.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

void Fibers::switch_to(int next) {
  if (next == running_) return;
  Fiber& from = fibers_[static_cast<size_t>(running_)];
  Fiber& to = fibers_[static_cast<size_t>(next)];
  running_ = next;
#if defined(__SANITIZE_ADDRESS__)
  const bool to_host = next == count_;
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack,
                                 to_host ? host_stack.begin : to.stack,
                                 to_host ? host_stack.bytes : kStackBytes);
#endif
#if defined(__x86_64__)
  moe_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void Fibers::report_deadlock() const {
  std::string where;
  for (const Barrier* barrier : barriers_) {
    if (barrier->waiting_.empty()) continue;
    where += (where.empty() ? "" : "; ") + std::to_string(barrier->waiting_.size()) + " of " +
             std::to_string(barrier->expected_) + " threads of " + barrier->name_ + " wait at " +
             barrier->what_;
  }
  throw std::logic_error("threads wait for ever: " + where + "; " + std::to_string(finished_) +
                         " of " + std::to_string(count_) + " have ended");
}

}  // namespace moe::cuda
