#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "geossl_api.h"

namespace geossl {
namespace {
std::atomic<int64_t> grain_divisor{1};
constexpr int kSpins = 2000;  // some tens of microseconds

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

int64_t pieces_of(int threads, int64_t n, int64_t grain) {
  const int64_t least = std::max<int64_t>(grain / grain_divisor.load(std::memory_order_relaxed), 1);
  return std::clamp<int64_t>(n / least, 1, std::max(threads, 1));
}

// The ticket is the number of the round in its upper half and how many of its chunks nobody has taken in its lower. Who lowers it has that
// chunk, and the round does not end before the chunk is done; the ticket of a round that is over cannot be lowered.
struct Helpers::State {
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> left{0};  // chunks that are not done
  std::atomic<bool> over{false};
  void (*work)(void*, int64_t) = nullptr;  // of the round
  void* context = nullptr;
  std::mutex mutex;
  std::exception_ptr error;  // the first of the round
  std::condition_variable awake;
  std::atomic<int> sleepers{0};
  std::vector<std::thread> others;

  // Takes and does one chunk of the round, if there is one.
  bool take() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (seen & 0xffffffffu) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acquire)) continue;
      try {
        work(context, static_cast<int64_t>(seen & 0xffffffffu) - 1);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
      left.fetch_sub(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  explicit State(int threads) {
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back([this] { help(); });
    } catch (const std::exception&) {  // those that there are do it all
    }
  }

  ~State() {
    over.store(true);
    wake();
    for (std::thread& other : others) other.join();
  }

  void help() {
    for (int idle = 0; !over.load();) {
      if (take()) {
        idle = 0;
      } else if (++idle < kSpins) {
        relax();
      } else {
        std::unique_lock<std::mutex> lock(mutex);
        ++sleepers;  // before the last look: whoever has work afterwards sees that somebody sleeps
        awake.wait(lock, [this] { return over.load() || (ticket.load() & 0xffffffffu); });
        --sleepers;
      }
    }
  }

  // Called after what they wait for has changed.
  void wake() {
    if (sleepers.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex); }  // who has looked too early is now asleep
    awake.notify_all();
  }
};

Helpers::~Helpers() { delete state_; }

void Helpers::run(int64_t chunks, void (*work)(void* context, int64_t chunk), void* context) {
  if (threads_ == 1 || chunks <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(context, chunk);
    return;
  }
  if (!state_) state_ = new State(threads_);
  State& state = *state_;
  state.work = work, state.context = context;
  state.left.store(chunks, std::memory_order_relaxed);
  const uint64_t round = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  state.ticket.store(round << 32 | static_cast<uint64_t>(chunks));
  state.wake();
  while (state.take()) {
  }
  for (int idle = 0; state.left.load(std::memory_order_acquire) > 0; ++idle) {
    if (idle < kSpins) relax();
    else std::this_thread::yield();
  }
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace geossl

// For tests: threads start for that many times less work, so that small inputs go through several.
GEOSSL_API int geossl_divide_grain_cpu(int64_t divisor) {
  if (divisor < 1) return GEOSSL_INVALID_ARGUMENT;
  geossl::grain_divisor.store(divisor, std::memory_order_relaxed);
  return GEOSSL_OK;
}
GEOSSL_PACKED(geossl_divide_grain_cpu)
