// The C interface of geossl's native libraries, and what every kernel file needs: exported names, return codes,
// vector clones of hot loops, and threads. Needs C++17 and nothing else (no Python, no torch, no OpenMP).
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

// Raise it whenever an exported function changes its arguments or meaning, together with ABI_VERSION in
// geossl/ops/_native.py: a library left over from before is then refused with a clear message.
#define GEOSSL_ABI_VERSION 4

#if defined(_WIN32)
#define GEOSSL_API extern "C" __declspec(dllexport)
#else
#define GEOSSL_API extern "C" __attribute__((visibility("default")))
#endif

// Exports `<name>_packed`, which takes the arguments of an exported function as words of 64 bits in one array: Python packs them all in a
// third of a microsecond, while ctypes takes two to convert a dozen arguments one by one. `<name>_types` names what the words must be.
#define GEOSSL_PACKED(name)                                                                                                        \
  GEOSSL_API int name##_packed(const void* words) { return geossl::call_packed(name, static_cast<const unsigned char*>(words)); } \
  GEOSSL_API const char* name##_types() { return geossl::types_of(name); }

// Every operator returns one of these, or a positive cudaError_t. _native.py turns them into exceptions.
enum GeosslStatus : int {
  GEOSSL_OK = 0,
  GEOSSL_INVALID_ARGUMENT = -1,  // sizes or options that the Python wrapper should have refused
  GEOSSL_OUT_OF_MEMORY = -2,     // host memory
  GEOSSL_TOO_LARGE = -3,         // more elements than the kernel's index type can count
  GEOSSL_INTERNAL = -4,          // an exception nobody expected
};

// Compiles a function three times, for any x86-64, for AVX2 and for AVX-512, and picks one when the library is loaded.
// Use it on free functions that contain the hot loop, for float alone: clones are not inlined into their callers, and each takes as long to
// compile as the function; float64 is there to be exact. It needs gcc 12 and
// glibc; elsewhere (AArch64 has NEON as its baseline) and under a sanitizer it is empty.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__CUDACC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GEOSSL_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define GEOSSL_HAS_SIMD_CLONES 1
#else
#define GEOSSL_SIMD
#define GEOSSL_HAS_SIMD_CLONES 0
#endif

// Defines a function for the same three machines from a body that is told the width of their vectors, `kBytes`.
#if GEOSSL_HAS_SIMD_CLONES
#define GEOSSL_VECTORS(head, ...)                                                                     \
  __attribute__((target("default"))) head { constexpr int kBytes = 16; __VA_ARGS__ }                  \
  __attribute__((target("arch=x86-64-v3"))) head { constexpr int kBytes = 32; __VA_ARGS__ }           \
  __attribute__((target("arch=x86-64-v4"))) head { constexpr int kBytes = 64; __VA_ARGS__ }
#else
#define GEOSSL_VECTORS(head, ...) head { constexpr int kBytes = 16; __VA_ARGS__ }
#endif

// Before a loop of that many steps inside a loop that shall be vectorised: gcc unrolls it first, which it does of itself at -O3 alone.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define GEOSSL_UNROLL(steps) _Pragma(GEOSSL_TEXT(GCC unroll steps))
#define GEOSSL_TEXT(words) #words
#else
#define GEOSSL_UNROLL(steps)
#endif

namespace geossl {

// An argument out of the word that holds it: integers and pointers as int64, floating numbers as double.
template <class T>
T from_word(const unsigned char* word) {
  std::conditional_t<std::is_floating_point_v<T>, double, int64_t> value;
  __builtin_memcpy(&value, word, sizeof value);
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(static_cast<intptr_t>(value));
  else return static_cast<T>(value);
}

// The types of a function's arguments as Python's `struct` names those of words: q is int64, d is double.
template <class... Args>
const char* types_of(int (*)(Args...)) {
  static constexpr char types[] = {(std::is_floating_point_v<Args> ? 'd' : 'q')..., '\0'};
  return types;
}

template <class... Args, size_t... I>
int call_words(int (*function)(Args...), const unsigned char* words, std::index_sequence<I...>) {
  return function(from_word<Args>(words + 8 * I)...);
}
template <class... Args>
int call_packed(int (*function)(Args...), const unsigned char* words) {
  return call_words(function, words, std::index_sequence_for<Args...>{});
}

// Threads for one call of an operator (cpu/threads.cpp). The caller shares out its work in chunks and takes chunks itself: where the others
// get no processor, it does all of it and waits for none of them. They start when there is first something to share, which takes about
// 20 us each, sleep when there has been nothing to do for some tens, and end with the object: nothing outlives a call, so a forked DataLoader
// worker can make one.
class Helpers {
 public:
  explicit Helpers(int threads) : threads_(threads > 1 ? threads : 1) {}  // the caller and the others, as many as the system grants
  ~Helpers();
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  int threads() const { return threads_; }

  // Calls f(chunk) once for each of that many chunks, and returns when all are done. The first exception thrown by f is thrown again here.
  template <class F>
  void share(int64_t chunks, F&& f) {
    using Body = std::remove_reference_t<F>;
    run(chunks, [](void* context, int64_t chunk) { (*static_cast<Body*>(context))(chunk); }, const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  struct State;
  void run(int64_t chunks, void (*work)(void* context, int64_t chunk), void* context);

  const int threads_;
  State* state_ = nullptr;
};

// Into how many pieces of at least `grain` n items are cut, at most one per thread.
int64_t pieces_of(int threads, int64_t n, int64_t grain);

// Calls f(begin, end) on contiguous pieces that together cover [0, n), one for each of at most `threads` threads, each at least `grain`
// long; choose it so that a piece is worth a millisecond.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  const int64_t pieces = pieces_of(threads, n, grain);
  if (pieces == 1) return f(int64_t{0}, n);
  Helpers(static_cast<int>(pieces)).share(pieces, [&](int64_t piece) { f(piece * n / pieces, (piece + 1) * n / pieces); });
}

// Runs the body of an exported function and turns exceptions into status codes: none may cross the C interface.
//   GEOSSL_API int geossl_fps_cpu(...) { return geossl::guarded([&] { ...; }); }
template <class F>
int guarded(F&& body) noexcept {
  try {
    body();
    return GEOSSL_OK;
  } catch (const std::bad_alloc&) {
    return GEOSSL_OUT_OF_MEMORY;
  } catch (...) {
    return GEOSSL_INTERNAL;
  }
}

}  // namespace geossl
