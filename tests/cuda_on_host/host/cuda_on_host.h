// cuda_on_host.h - compile a .cu file with an ordinary C++17 compiler and run its kernels on the CPU.
//
// Purpose: testing CUDA kernels on machines without a GPU.  Not for speed, not for production.
//
// Model
//   * One OS thread runs everything.  Every CUDA thread of a block is a fiber with a stack of its own.
//     Blocks run one after the other; inside a block, a fiber runs until it blocks (barrier or warp
//     collective), exits, or is told to yield (atomics, in random schedules).
//   * The schedule is a pure function of the seed, so every run is reproducible:
//       seed 0 = ascending threads and blocks, 1 = descending, >= 2 = random permutation per pass.
//     A kernel whose result depends on the seed has a race (or a float atomic, whose order is free).
//   * Shared memory is heap memory of the exact size asked for, filled with 0xFF (NaN / -1) before
//     every block: reads of uninitialised shared memory show, and AddressSanitizer sees overruns.
//   * Misuse is diagnosed, not emulated: divergent barriers, threads that exit before a barrier, lanes
//     missing from a shuffle mask, reads from lanes outside the mask, bad launch configurations.
//   * With -fsanitize=thread every CUDA thread is a TSan fiber, and only what CUDA guarantees creates
//     an ordering (launch start/end, __syncthreads, __syncwarp, atomics are atomic): TSan then reports
//     data races between CUDA threads, in shared and in global memory, within and across blocks.
//
// How to use: put this folder on the include path before any CUDA toolkit, compile with
//   g++ -std=c++17 -x c++ -I<this folder> kernel.cu
// The .cu file must launch through gpu::launch() (see gpu_compat.h) and declare shared memory with
// GPU_SHARED / GPU_DYNAMIC_SHARED.  Everything else is plain CUDA C++.
#pragma once
#ifdef __CUDACC__
#error "cuda_on_host.h replaces the CUDA headers; do not compile it with nvcc"
#endif
#define CUDA_ON_HOST 1

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define COH_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define COH_TSAN 1
#define COH_NOSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define COH_NOSAN
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#define COH_UCONTEXT 1
#endif

// ------------------------------------------------------------------------------------------------
// 1. Function and variable qualifiers
// ------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// ------------------------------------------------------------------------------------------------
// 2. Vector types
// ------------------------------------------------------------------------------------------------
#define COH_VEC(T, S, A2, A4)                                                                       \
  struct T##1 { S x; };                                                                             \
  struct alignas(A2) T##2 { S x, y; };                                                              \
  struct T##3 { S x, y, z; };                                                                       \
  struct alignas(A4) T##4 { S x, y, z, w; };                                                        \
  inline T##1 make_##T##1(S x) { return {x}; }                                                      \
  inline T##2 make_##T##2(S x, S y) { return {x, y}; }                                              \
  inline T##3 make_##T##3(S x, S y, S z) { return {x, y, z}; }                                      \
  inline T##4 make_##T##4(S x, S y, S z, S w) { return {x, y, z, w}; }
COH_VEC(char, signed char, 2, 4)
COH_VEC(uchar, unsigned char, 2, 4)
COH_VEC(short, short, 4, 8)
COH_VEC(ushort, unsigned short, 4, 8)
COH_VEC(int, int, 8, 16)
COH_VEC(uint, unsigned, 8, 16)
COH_VEC(float, float, 8, 16)
COH_VEC(longlong, long long, 16, 16)
COH_VEC(ulonglong, unsigned long long, 16, 16)
COH_VEC(double, double, 16, 16)
#undef COH_VEC

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ------------------------------------------------------------------------------------------------
// 3. Runtime API subset.  Every call is synchronous; device memory is host memory.
// ------------------------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719
};
typedef struct CUstream_st* cudaStream_t;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                      cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace coh {

constexpr unsigned kWarp = 32;
constexpr size_t kSmemDefault = 48 * 1024;   // without cudaFuncSetAttribute
constexpr size_t kSmemOptIn = 99 * 1024;     // smallest opt-in limit of sm_86/89/120; sm_80 163, sm_90/100 227 KiB

struct Site { const char* file; int line; };
enum class State : uint8_t { Ready, Barrier, Warp, Done };
enum class Op : uint8_t { None, Sync, Shfl, Ballot, MatchAny, Add, MinS, MaxS, MinU, MaxU, And, Or, Xor };

struct Thread {
  void* sp = nullptr;                // saved stack pointer of the fiber
  uint3 tid{};
  unsigned linear = 0, lane = 0, warp = 0;
  State state = State::Ready;
  Site site{"?", 0};                 // where it waits
  Op op = Op::None;                  // pending warp collective
  unsigned mask = 0;
  int src = 0;
  uint64_t val = 0, res = 0;
  int vote = 0;                      // argument of __syncthreads_count/and/or
#ifdef COH_UCONTEXT
  ucontext_t uc;
#endif
  void* fake = nullptr;              // ASan fake stack
  void* tsan = nullptr;              // TSan fiber
};

struct Shared { const void* key; void* ptr; };
constexpr unsigned kSlots = 64, kGap = 64;

struct Device {                      // the one emulated device
  std::recursive_mutex mutex;        // one kernel at a time
  unsigned seed = 0;
  bool exited_ok = false;            // tolerate threads that exited before a barrier
  uint64_t rng = 0;
  // the running block
  Thread* th = nullptr;
  unsigned n = 0, alive = 0, arrived = 0, votes = 0, ballots = 0;
  Site bar_site{"?", 0};
  unsigned pending[32] = {};         // per warp: lanes waiting in a collective
  uint3 bid{};
  dim3 bdim, gdim;
  Shared slot[kSlots];               // static shared variables of this block
  unsigned slots = 0;
  unsigned char* arena = nullptr;    // where they lie
  unsigned char* dyn = nullptr;      // dynamic shared memory of this block
  size_t dyn_bytes = 0, static_bytes = 0;
  void (*entry)(void*) = nullptr;
  void* arg = nullptr;
  Thread sched;                      // the scheduler's own context
  const void* sched_bottom = nullptr;  // its stack, for ASan
  size_t sched_size = 0;
  char* stacks = nullptr;
  size_t stack_bytes = 0, stack_map = 0;
  unsigned stack_count = 0;
  bool failed = false;
  cudaError_t last = cudaSuccess;
  char message[1024] = "";
  std::map<const void*, size_t> smem_optin;
  std::vector<void*> graveyard;
  unsigned long long switches = 0;   // statistics
  char bar_obj = 0, end_obj = 0, warp_obj[33] = {};  // TSan sync addresses
  Device() {
    if (const char* s = std::getenv("COH_SEED")) seed = unsigned(std::strtoul(s, nullptr, 10));
    if (const char* s = std::getenv("COH_EXITED_OK")) exited_ok = std::atoi(s) != 0;
  }
};

inline Device& dev() { static Device* d = new Device; return *d; }
inline Device* g = &dev();           // plain pointers: only the OS thread holding dev().mutex uses them
inline Thread* cur = nullptr;

// -------- context switch --------------------------------------------------------------------------
#if defined(__x86_64__)
extern "C" void coh_switch(void** save, void* to) __attribute__((visibility("hidden")));
asm(".pushsection .text.coh_switch,\"axG\",@progbits,coh_switch,comdat\n"
    ".weak coh_switch\n.hidden coh_switch\n.type coh_switch,@function\ncoh_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size coh_switch,.-coh_switch\n.popsection\n");
inline void* make_stack(char* top, void (*f)()) {
  void** p = reinterpret_cast<void**>(top);
  *--p = nullptr;                              // keeps the ABI's 16-byte alignment at f's entry
  *--p = reinterpret_cast<void*>(f);
  for (int i = 0; i < 6; ++i) *--p = nullptr;  // r15..rbp
  return p;
}
#elif defined(__aarch64__)
extern "C" void coh_switch(void** save, void* to) __attribute__((visibility("hidden")));
asm(".pushsection .text.coh_switch,\"axG\",@progbits,coh_switch,comdat\n"
    ".weak coh_switch\n.hidden coh_switch\n.type coh_switch,@function\ncoh_switch:\n"
    " sub sp,sp,#160\n"
    " stp x19,x20,[sp]\n stp x21,x22,[sp,#16]\n stp x23,x24,[sp,#32]\n stp x25,x26,[sp,#48]\n"
    " stp x27,x28,[sp,#64]\n stp x29,x30,[sp,#80]\n"
    " stp d8,d9,[sp,#96]\n stp d10,d11,[sp,#112]\n stp d12,d13,[sp,#128]\n stp d14,d15,[sp,#144]\n"
    " mov x9,sp\n str x9,[x0]\n mov sp,x1\n"
    " ldp x19,x20,[sp]\n ldp x21,x22,[sp,#16]\n ldp x23,x24,[sp,#32]\n ldp x25,x26,[sp,#48]\n"
    " ldp x27,x28,[sp,#64]\n ldp x29,x30,[sp,#80]\n"
    " ldp d8,d9,[sp,#96]\n ldp d10,d11,[sp,#112]\n ldp d12,d13,[sp,#128]\n ldp d14,d15,[sp,#144]\n"
    " add sp,sp,#160\n ret\n"
    ".size coh_switch,.-coh_switch\n.popsection\n");
inline void* make_stack(char* top, void (*f)()) {
  void** p = reinterpret_cast<void**>(top - 160);
  std::memset(p, 0, 160);
  p[11] = reinterpret_cast<void*>(f);          // x30, the return address
  return p;
}
#endif

inline char* stack_of(unsigned i) { return g->stacks + size_t(i) * g->stack_bytes; }

// `from` is saved, `to` resumes.  `dying`: from never runs again.
COH_NOSAN inline void switch_to(Thread* from, Thread* to, bool dying = false) {
  ++g->switches;
#ifdef COH_ASAN
  bool to_sched = to == &g->sched;
  __sanitizer_start_switch_fiber(dying ? nullptr : &from->fake,
                                 to_sched ? g->sched_bottom : stack_of(to->linear),
                                 to_sched ? g->sched_size : g->stack_bytes);
#endif
#ifdef COH_TSAN
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef COH_UCONTEXT
  (void)dying; swapcontext(&from->uc, &to->uc);
#else
  coh_switch(&from->sp, to->sp);
#endif
#ifdef COH_ASAN
  const void* ob; size_t os;
  __sanitizer_finish_switch_fiber(from->fake, &ob, &os);
#endif
  (void)dying;
}

COH_NOSAN inline void yield_to_scheduler() { switch_to(cur, &g->sched); }

COH_NOSAN inline uint64_t rnd() {   // xorshift64*
  uint64_t x = g->rng; x ^= x >> 12; x ^= x << 25; x ^= x >> 27; g->rng = x;
  return x * 0x2545F4914F6CDD1DULL;
}

// Called from a device thread: record the error, leave the block for good.
[[noreturn]] inline void fail(const char* fmt, ...) {
  if (!g->failed) {
    int k = 0;
    if (cur) k = std::snprintf(g->message, sizeof g->message, "block (%u,%u,%u) thread (%u,%u,%u): ",
                               g->bid.x, g->bid.y, g->bid.z, cur->tid.x, cur->tid.y, cur->tid.z);
    va_list a; va_start(a, fmt);
    std::vsnprintf(g->message + k, sizeof g->message - size_t(k), fmt, a); va_end(a);
    g->failed = true;
  }
  for (;;) yield_to_scheduler();
}

// -------- barriers -----------------------------------------------------------------------------
COH_NOSAN inline void release_barrier() {
  g->ballots = g->votes; g->votes = 0; g->arrived = 0;
  for (unsigned i = 0; i < g->n; ++i)
    if (g->th[i].state == State::Barrier) g->th[i].state = State::Ready;
}
COH_NOSAN inline unsigned barrier(Site s, int vote) {
  if (g->arrived && (g->bar_site.line != s.line || std::strcmp(g->bar_site.file, s.file) != 0))
    fail("divergent __syncthreads: this thread is at %s:%d, others wait at %s:%d", s.file, s.line,
         g->bar_site.file, g->bar_site.line);
  g->bar_site = s; cur->site = s; cur->state = State::Barrier;
  g->votes += vote ? 1u : 0u; ++g->arrived;
#ifdef COH_TSAN
  __tsan_release(&g->bar_obj);
#endif
  if (g->arrived == (g->exited_ok ? g->alive : g->n)) release_barrier();
  yield_to_scheduler();
#ifdef COH_TSAN
  __tsan_acquire(&g->bar_obj);
#endif
  return g->ballots;
}

// -------- warp collectives ---------------------------------------------------------------------
COH_NOSAN inline uint64_t resolve(const Thread* w, unsigned lane, unsigned mask) {
  const Thread& me = w[lane];
  if (me.op == Op::Shfl) return w[me.src].val;
  if (me.op == Op::Sync) return 0;
  if (me.op == Op::Ballot || me.op == Op::MatchAny) {
    uint64_t r = 0;
    for (unsigned l = 0; l < kWarp; ++l)
      if (mask >> l & 1) r |= uint64_t(me.op == Op::Ballot ? w[l].val != 0 : w[l].val == me.val) << l;
    return r;
  }
  bool first = true; uint32_t acc = 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    uint32_t v = uint32_t(w[l].val);
    if (first) { acc = v; first = false; continue; }
    switch (me.op) {
      case Op::Add: acc += v; break;
      case Op::MinU: acc = v < acc ? v : acc; break;
      case Op::MaxU: acc = v > acc ? v : acc; break;
      case Op::MinS: acc = int32_t(v) < int32_t(acc) ? v : acc; break;
      case Op::MaxS: acc = int32_t(v) > int32_t(acc) ? v : acc; break;
      case Op::And: acc &= v; break;
      case Op::Or: acc |= v; break;
      default: acc ^= v; break;
    }
  }
  return acc;
}

COH_NOSAN inline uint64_t warp_op(Op op, unsigned mask, uint64_t val, int src, Site s) {
  Thread* w = g->th + cur->warp * kWarp;
  unsigned size = std::min(kWarp, g->n - cur->warp * kWarp);
  if (!(mask >> cur->lane & 1)) fail("%s:%d: the calling lane %u is not in the mask %08x", s.file, s.line, cur->lane, mask);
  if (size < kWarp && mask >> size) fail("%s:%d: mask %08x names lanes that this warp of %u threads lacks", s.file, s.line, mask, size);
  if (op == Op::Shfl && !(mask >> src & 1)) fail("%s:%d: shuffle reads lane %d, which is not in the mask %08x", s.file, s.line, src, mask);
  cur->op = op; cur->mask = mask; cur->val = val; cur->src = src; cur->site = s; cur->state = State::Warp;
#ifdef COH_TSAN
  if (op == Op::Sync) __tsan_release(&g->warp_obj[cur->warp]);   // shuffles and votes order no memory
#endif
  unsigned& pending = g->pending[cur->warp];
  if (unsigned others = pending & mask) {   // every one of them agreed with the first, so one comparison is enough
    const Thread& o = w[__builtin_ctz(others)];
    if (o.op != op || o.mask != mask)
      fail("%s:%d: lane %u waits at %s:%d in another warp operation or with another mask (%08x, here %08x)", s.file,
           s.line, o.lane, o.site.file, o.site.line, o.mask, mask);
  }
  pending |= 1u << cur->lane;
  if ((pending & mask) == mask) {   // the last lane: compute everybody's result, then all go on
    pending &= ~mask;
    for (unsigned l = 0; l < size; ++l) if (mask >> l & 1) w[l].res = resolve(w, l, mask);
    for (unsigned l = 0; l < size; ++l) if (mask >> l & 1) w[l].state = State::Ready;
    if (g->seed >= 2) yield_to_scheduler();
  } else {
    yield_to_scheduler();
  }
#ifdef COH_TSAN
  if (op == Op::Sync) __tsan_acquire(&g->warp_obj[cur->warp]);
#endif
  return cur->res;
}

template <class T> inline uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "warp operations carry at most 8 bytes");
  uint64_t b = 0; std::memcpy(&b, &v, sizeof v); return b;
}
template <class T> inline T from_bits(uint64_t b) { T v; std::memcpy(&v, &b, sizeof v); return v; }
template <class T> inline T shfl(unsigned mask, T v, int src, Site s) {
  return from_bits<T>(warp_op(Op::Shfl, mask, to_bits(v), src, s));
}
COH_NOSAN inline int src_idx(int l, int width) { int b = int(cur->lane) & ~(width - 1); return b | (l & (width - 1)); }
COH_NOSAN inline int src_up(int d, int width) { int b = int(cur->lane) & ~(width - 1), s = int(cur->lane) - d; return s < b ? int(cur->lane) : s; }
COH_NOSAN inline int src_down(int d, int width) { int o = int(cur->lane) & (width - 1); return o + d >= width ? int(cur->lane) : int(cur->lane) + d; }
COH_NOSAN inline int src_xor(int m, int width) { int b = int(cur->lane) & ~(width - 1), s = int(cur->lane) ^ m; return s >= b + width ? int(cur->lane) : s; }

// -------- shared memory ------------------------------------------------------------------------
// Filled by the scheduler before the block starts; fibers only carve slots off (no write TSan could misread).
// Static slots lie in an arena whose gaps are poisoned for ASan, dynamic memory is a malloc of the exact size.
inline unsigned char* garbage(size_t bytes) {
  auto* p = static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1));
  std::memset(p, 0xFF, bytes);
  return p;
}
COH_NOSAN inline void* shared_slot(const void* key, size_t bytes) {
  for (unsigned i = 0; i < g->slots; ++i) if (g->slot[i].key == key) return g->slot[i].ptr;
  if (g->static_bytes + bytes > kSmemDefault || g->slots == kSlots) fail("static shared memory over 48 KiB, or over %u variables", kSlots);
  unsigned char* p = g->arena + g->static_bytes + size_t(g->slots) * kGap;
  p += -reinterpret_cast<uintptr_t>(p) & 15;
  g->static_bytes += (bytes + 15) & ~size_t(15);
  g->slot[g->slots++] = {key, p};
#ifdef COH_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
  return p;
}
// The lambda passed as tag has a type of its own for every declaration and template instance.
template <class T, class Tag> inline T& shared_var(Tag) {
  static const char key = 0;
  return *static_cast<T*>(shared_slot(&key, sizeof(T)));
}
COH_NOSAN inline void* dynamic_shared() { return g->dyn; }

// -------- running a block -------------------------------------------------------------------------
COH_NOSAN inline void fiber_main() {
#ifdef COH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &g->sched_bottom, &g->sched_size);
#endif
  g->entry(g->arg);
#ifdef COH_TSAN
  __tsan_release(&g->end_obj);
#endif
  cur->state = State::Done; --g->alive;
  if (g->exited_ok && g->alive && g->arrived == g->alive) release_barrier();
  switch_to(cur, &g->sched, true);
  std::abort();
}

inline void describe_deadlock() {
  unsigned waiting = 0, exited = 0; const Thread* t0 = nullptr;
  for (unsigned i = 0; i < g->n; ++i) {
    if (g->th[i].state == State::Done) ++exited;
    else { ++waiting; if (!t0) t0 = &g->th[i]; }
  }
  std::snprintf(g->message, sizeof g->message,
                "block (%u,%u,%u): deadlock, %u threads wait and %u have exited; thread %u waits at %s:%d in %s (mask %08x)",
                g->bid.x, g->bid.y, g->bid.z, waiting, exited, t0->linear, t0->site.file, t0->site.line,
                t0->state == State::Barrier ? "__syncthreads" : "a warp operation", t0->mask);
  g->failed = true;
}

inline void need_stacks(unsigned n) {
#ifdef COH_ASAN
  const size_t want = 256 * 1024;
#else
  const size_t want = 64 * 1024;
#endif
  if (g->stack_count >= n) return;
  if (g->stacks) munmap(g->stacks, g->stack_map);
  g->stack_bytes = want; g->stack_count = n; g->stack_map = want * n;
  void* p = mmap(nullptr, want * g->stack_count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) { std::perror("cuda_on_host: mmap"); std::abort(); }
  g->stacks = static_cast<char*>(p);
  size_t page = size_t(sysconf(_SC_PAGESIZE));                       // lowest page of a stack: overflow traps
  for (unsigned i = 0; i < g->stack_count; ++i) mprotect(stack_of(i), page, PROT_NONE);
}

COH_NOSAN inline void run_block(std::vector<unsigned>& order) {
  g->alive = g->n; g->arrived = g->votes = 0; g->static_bytes = 0; g->slots = 0;
  std::memset(g->pending, 0, sizeof g->pending);
  g->dyn = garbage(g->dyn_bytes);
  const size_t arena_bytes = kSmemDefault + size_t(kSlots + 1) * kGap;
  g->arena = garbage(arena_bytes);
#ifdef COH_ASAN
  __asan_poison_memory_region(g->arena, arena_bytes);
#endif
#ifdef COH_TSAN
  g->stack_count = 0;                // fresh stacks: TSan must not relate frames of different blocks
#endif
  need_stacks(g->n);
  for (unsigned i = 0; i < g->n; ++i) {
    Thread& t = g->th[i];
    t.state = State::Ready; t.op = Op::None; t.fake = nullptr;
#ifdef COH_ASAN    // frames of earlier fibers on this stack may have left red zones behind
    __asan_unpoison_memory_region(stack_of(i) + 4096, g->stack_bytes - 4096);
#endif
#ifdef COH_UCONTEXT
    getcontext(&t.uc); t.uc.uc_stack.ss_sp = stack_of(i); t.uc.uc_stack.ss_size = g->stack_bytes;
    t.uc.uc_link = nullptr; makecontext(&t.uc, fiber_main, 0);
#else
    t.sp = make_stack(stack_of(i) + g->stack_bytes - (i & 31) * 320, fiber_main);  // spread over the cache sets
#endif
#ifdef COH_TSAN
    t.tsan = __tsan_create_fiber(0);
#endif
  }
  for (unsigned i = 0; i < g->n; ++i) order[i] = g->seed == 1 ? g->n - 1 - i : i;
  while (g->alive && !g->failed) {
    if (g->seed >= 2) for (unsigned i = g->n; i > 1; --i) std::swap(order[i - 1], order[rnd() % i]);
    bool progress = false;
    for (unsigned i = 0; i < g->n && !g->failed; ++i) {
      Thread& t = g->th[order[i]];
      if (t.state != State::Ready) continue;
      progress = true; cur = &t;
      switch_to(&g->sched, &t);
      cur = nullptr;
    }
    if (!progress) describe_deadlock();
  }
#ifdef COH_TSAN
  for (unsigned i = 0; i < g->n; ++i) __tsan_destroy_fiber(g->th[i].tsan);
#endif
#ifdef COH_ASAN
  __asan_unpoison_memory_region(g->arena, arena_bytes);
#endif
#ifdef COH_TSAN    // free() counts as a write: only after the end of the grid is it ordered after the kernel's reads
  g->graveyard.push_back(g->arena); g->graveyard.push_back(g->dyn);
#else
  std::free(g->arena); std::free(g->dyn);
#endif
  g->arena = g->dyn = nullptr;
}

inline cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t smem, void (*entry)(void*), void* arg) {
  std::lock_guard<std::recursive_mutex> lock(g->mutex);
  auto bad = [&](const char* why, unsigned long long v) {
    std::snprintf(g->message, sizeof g->message, "launch: %s (%llu)", why, v);
    return g->last = cudaErrorInvalidConfiguration;
  };
  unsigned long long n = 1ull * block.x * block.y * block.z, nb = 1ull * grid.x * grid.y * grid.z;
  if (cur) return bad("a kernel launched a kernel", 0);
  if (n == 0 || n > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) return bad("bad block size", n);
  if (nb == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return bad("bad grid size", nb);
  auto it = g->smem_optin.find(kernel);
  if (smem > (it == g->smem_optin.end() ? kSmemDefault : it->second)) return bad("too much dynamic shared memory", smem);
  std::vector<Thread> th(n);
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) {
    th[i].tid = uint3{i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    th[i].linear = i; th[i].lane = i % kWarp; th[i].warp = i / kWarp;
  }
  g->th = th.data(); g->n = unsigned(n); g->bdim = block; g->gdim = grid; g->dyn_bytes = smem;
  g->entry = entry; g->arg = arg; g->failed = false;
  g->rng = 0x9E3779B97F4A7C15ULL * (g->seed + 1);
#ifdef COH_TSAN
  g->sched.tsan = __tsan_get_current_fiber();
#endif
  std::vector<unsigned long long> blocks(nb);
  std::iota(blocks.begin(), blocks.end(), 0ull);
  if (g->seed == 1) std::reverse(blocks.begin(), blocks.end());
  if (g->seed >= 2) for (auto i = nb; i > 1; --i) std::swap(blocks[i - 1], blocks[rnd() % i]);
  for (auto b : blocks) {
    g->bid = uint3{unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (1ull * grid.x * grid.y))};
    run_block(order);
    if (g->failed) break;
  }
#ifdef COH_TSAN
  __tsan_acquire(&g->end_obj);
  for (void* p : g->graveyard) std::free(p);
  g->graveyard.clear();
#endif
  g->th = nullptr; cur = nullptr;
  if (g->failed) { std::fprintf(stderr, "cuda_on_host: %s\n", g->message); g->last = cudaErrorLaunchFailure; return g->last; }
  return cudaSuccess;
}

// -------- atomics --------------------------------------------------------------------------------
COH_NOSAN inline void maybe_yield() { if (g->seed >= 2 && cur && (rnd() & 3) == 0) yield_to_scheduler(); }
template <class T, class F> inline T atomic_rmw(T* p, F f) {
  maybe_yield();
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do { now = f(old); } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace coh

// ------------------------------------------------------------------------------------------------
// 4. Device built-ins
// ------------------------------------------------------------------------------------------------
namespace coh {   // by value, through functions TSan does not instrument
COH_NOSAN inline uint3 thread_idx() { return cur->tid; }
COH_NOSAN inline uint3 block_idx() { return g->bid; }
COH_NOSAN inline dim3 block_dim() { return g->bdim; }
COH_NOSAN inline dim3 grid_dim() { return g->gdim; }
}  // namespace coh
#define threadIdx (::coh::thread_idx())
#define blockIdx (::coh::block_idx())
#define blockDim (::coh::block_dim())
#define gridDim (::coh::grid_dim())
constexpr int warpSize = 32;
#define COH_SITE ::coh::Site{__FILE__, __LINE__}

#define __syncthreads() ((void)::coh::barrier(COH_SITE, 0))
#define __syncthreads_count(p) (int(::coh::barrier(COH_SITE, (p) ? 1 : 0)))
#define __syncthreads_or(p) (::coh::barrier(COH_SITE, (p) ? 1 : 0) != 0)
#define __syncthreads_and(p) (::coh::barrier(COH_SITE, (p) ? 0 : 1) == 0)
#define __syncwarp(...) ((void)::coh::warp_op(::coh::Op::Sync, ::coh::mask_or_full(__VA_ARGS__), 0, 0, COH_SITE))
#define __ballot_sync(m, p) (unsigned(::coh::warp_op(::coh::Op::Ballot, m, (p) ? 1 : 0, 0, COH_SITE)))
#define __any_sync(m, p) (__ballot_sync(m, p) != 0)
#define __all_sync(m, p) (__ballot_sync(m, !(p)) == 0)
#define __match_any_sync(m, v) (unsigned(::coh::warp_op(::coh::Op::MatchAny, m, ::coh::to_bits(v), 0, COH_SITE)))
#define __shfl_sync(m, ...) ::coh::shfl_idx(COH_SITE, m, __VA_ARGS__)
#define __shfl_up_sync(m, ...) ::coh::shfl_up(COH_SITE, m, __VA_ARGS__)
#define __shfl_down_sync(m, ...) ::coh::shfl_down(COH_SITE, m, __VA_ARGS__)
#define __shfl_xor_sync(m, ...) ::coh::shfl_xor(COH_SITE, m, __VA_ARGS__)
#define __reduce_add_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::Add, ::coh::Op::Add, m, v)
#define __reduce_min_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::MinS, ::coh::Op::MinU, m, v)
#define __reduce_max_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::MaxS, ::coh::Op::MaxU, m, v)
#define __reduce_and_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::And, ::coh::Op::And, m, v)
#define __reduce_or_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::Or, ::coh::Op::Or, m, v)
#define __reduce_xor_sync(m, v) ::coh::reduce(COH_SITE, ::coh::Op::Xor, ::coh::Op::Xor, m, v)
// __activemask() is left out on purpose: its value is not specified enough to test against.

namespace coh {
inline unsigned mask_or_full(unsigned m = 0xffffffffu) { return m; }
template <class T> inline T shfl_idx(Site s, unsigned m, T v, int l, int w = 32) { return shfl(m, v, src_idx(l, w), s); }
template <class T> inline T shfl_up(Site s, unsigned m, T v, unsigned d, int w = 32) { return shfl(m, v, src_up(int(d), w), s); }
template <class T> inline T shfl_down(Site s, unsigned m, T v, unsigned d, int w = 32) { return shfl(m, v, src_down(int(d), w), s); }
template <class T> inline T shfl_xor(Site s, unsigned m, T v, int x, int w = 32) { return shfl(m, v, src_xor(x, w), s); }
inline unsigned reduce(Site s, Op, Op u, unsigned m, unsigned v) { return unsigned(warp_op(u, m, v, 0, s)); }
inline int reduce(Site s, Op i, Op, unsigned m, int v) { return int(uint32_t(warp_op(i, m, uint32_t(v), 0, s))); }
template <class T> struct same { using type = T; };
template <class T> using same_t = typename same<T>::type;
}  // namespace coh

template <class T> inline T atomicAdd(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return T(o + v); }); }
template <class T> inline T atomicSub(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return T(o - v); }); }
template <class T> inline T atomicMin(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return v < o ? v : o; }); }
template <class T> inline T atomicMax(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return o < v ? v : o; }); }
template <class T> inline T atomicAnd(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return T(o & v); }); }
template <class T> inline T atomicOr(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return T(o | v); }); }
template <class T> inline T atomicXor(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T o) { return T(o ^ v); }); }
template <class T> inline T atomicExch(T* p, coh::same_t<T> v) { return coh::atomic_rmw(p, [=](T) { return v; }); }
template <class T> inline T atomicCAS(T* p, coh::same_t<T> cmp, coh::same_t<T> v) {
  coh::maybe_yield();
  T old = cmp;   // __atomic compares the object representation, as the hardware does
  __atomic_compare_exchange(p, &old, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned m) { return coh::atomic_rmw(p, [=](unsigned o) { return o >= m ? 0u : o + 1; }); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T> inline T __ldg(const T* p) { return *p; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline unsigned __brev(unsigned v) { unsigned r = 0; for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i); return r; }
inline int __float_as_int(float v) { return coh::from_bits<int>(coh::to_bits(v)); }
inline unsigned __float_as_uint(float v) { return coh::from_bits<unsigned>(coh::to_bits(v)); }
inline float __int_as_float(int v) { return coh::from_bits<float>(coh::to_bits(v)); }
inline float __uint_as_float(unsigned v) { return coh::from_bits<float>(coh::to_bits(v)); }
inline long long __double_as_longlong(double v) { return coh::from_bits<long long>(coh::to_bits(v)); }
inline double __longlong_as_double(long long v) { return coh::from_bits<double>(coh::to_bits(v)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __saturatef(float a) { return a < 0.f ? 0.f : a > 1.f ? 1.f : a; }   // NaN passes; CUDA gives 0
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
using std::max;
using std::min;

// ------------------------------------------------------------------------------------------------
// 5. Runtime API functions
// ------------------------------------------------------------------------------------------------
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : coh::g->message; }
inline cudaError_t cudaPeekAtLastError() { return coh::g->last; }
inline cudaError_t cudaGetLastError() { cudaError_t e = coh::g->last; coh::g->last = cudaSuccess; return e; }
inline cudaError_t cudaMalloc(void** p, size_t n) { *p = std::malloc(n ? n : 1); if (*p) std::memset(*p, 0xFF, n); return *p ? cudaSuccess : cudaErrorMemoryAllocation; }
inline cudaError_t cudaFree(void* p) { std::free(p); return cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int v, size_t n) { std::memset(p, v, n); return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t = nullptr) { return cudaMemset(p, v, n); }
inline cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { std::memmove(d, s, n); return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t = nullptr) { return cudaMemcpy(d, s, n, k); }
inline cudaError_t cudaDeviceSynchronize() { return coh::g->last; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return coh::g->last; }
inline cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : cudaErrorInvalidValue; }
template <class K> inline cudaError_t cudaFuncSetAttribute(K* k, cudaFuncAttribute a, int v) {
  if (a != cudaFuncAttributeMaxDynamicSharedMemorySize || v < 0 || size_t(v) > coh::kSmemOptIn) {
    std::snprintf(coh::g->message, sizeof coh::g->message, "cudaFuncSetAttribute: %d bytes of dynamic shared memory is over the portable limit", v);
    return coh::g->last = cudaErrorInvalidValue;
  }
  coh::g->smem_optin[reinterpret_cast<const void*>(k)] = std::max(size_t(v), coh::kSmemDefault);
  return cudaSuccess;
}

// Controls for test programs and for ctypes.
extern "C" {
__attribute__((weak, visibility("default"))) void coh_set_seed(unsigned s) { coh::g->seed = s; }
__attribute__((weak, visibility("default"))) const char* coh_last_message() { return coh::g->message; }
__attribute__((weak, visibility("default"))) unsigned long long coh_switches() { return coh::g->switches; }
}
