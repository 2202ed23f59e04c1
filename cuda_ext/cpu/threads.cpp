#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "geossl_api.h"

namespace geossl {
namespace {
std::atomic<int64_t> grain_divisor{1};
}

int64_t pieces_of(int threads, int64_t n, int64_t grain) {
  const int64_t least = std::max<int64_t>(grain / grain_divisor.load(std::memory_order_relaxed), 1);
  return std::clamp<int64_t>(n / least, 1, std::max(threads, 1));
}

void run_pieces(int64_t pieces, int64_t n, void (*piece)(void* context, int64_t begin, int64_t end), void* context) {
  if (pieces == 1) return piece(context, 0, n);
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto run = [&](int64_t number) {
    try {
      piece(context, number * n / pieces, (number + 1) * n / pieces);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(pieces - 1));
  int64_t next = 1;
  try {
    for (; next < pieces; ++next) workers.emplace_back(run, next);
  } catch (...) {  // the system refuses more threads: the caller does what is left
  }
  run(0);
  for (; next < pieces; ++next) run(next);
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace geossl

// For tests: threads start for that many times less work, so that small inputs go through several.
GEOSSL_API int geossl_divide_grain_cpu(int64_t divisor) {
  if (divisor < 1) return GEOSSL_INVALID_ARGUMENT;
  geossl::grain_divisor.store(divisor, std::memory_order_relaxed);
  return GEOSSL_OK;
}
GEOSSL_PACKED(geossl_divide_grain_cpu)
