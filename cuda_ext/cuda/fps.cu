// Farthest point sampling on the GPU. Up to kInRegisters points a cloud: one block per cloud, which keeps points and distances in registers
// and takes one barrier per pick. More: one launch per pick, in which all blocks of a cloud share the work; the stream is the barrier.
#include "warp.cuh"

namespace geossl {
namespace {

struct Options {
  const int64_t* out_offsets;  // packed: where the picks of each cloud go
  int64_t k, start;
  const int64_t* starts;
  const uint8_t* mask;
  double min_sq_norm;  // negative: none
};

template <class T>
struct Job {
  const T* points;
  Clouds clouds;
  Options options;
  int64_t* out;
};

// The part of a job that concerns one cloud.
template <class T>
struct Cloud {
  const T* points;
  const uint8_t* mask;
  int64_t* out;
  int64_t base, k;
  int32_t n, start;
  bool parity;
  double min_sq_norm;

  __device__ Cloud(const Job<T>& job, int64_t b) {
    const Options& o = job.options;
    const int64_t row = job.clouds.begin(b), first = o.starts ? o.starts[b] : o.start;
    points = job.points + 3 * row;
    mask = o.mask ? o.mask + row : nullptr;
    base = job.clouds.index_base(b);
    n = static_cast<int32_t>(job.clouds.size(b));
    k = o.out_offsets ? o.out_offsets[b + 1] - o.out_offsets[b] : o.k;
    out = job.out + (o.out_offsets ? o.out_offsets[b] : b * o.k);
    start = first >= 0 && first < n ? static_cast<int32_t>(first) : 0;
    parity = o.min_sq_norm >= 0;
    min_sq_norm = o.min_sq_norm;
  }
  // How far after the start, going round, a point comes; ~0 if it must not be picked first.
  __device__ unsigned distance_from_start(int32_t i, T x, T y, T z) const {
    if (!finite(x, y, z) || (mask && !mask[i])) return ~0u;
    return static_cast<unsigned>(i >= start ? i - start : i - start + n);
  }
  // +inf, or -1 for a point that must not be picked later: -1 stays the minimum.
  __device__ T initial_distance(int32_t i, T x, T y, T z) const {
    const bool far_enough = !parity || static_cast<double>(squared(x, y, z)) > min_sq_norm;
    return finite(x, y, z) && (!mask || mask[i]) && far_enough ? infinity<T>() : T(-1);
  }
  __device__ int32_t row_after_start(unsigned steps) const {
    const int64_t row = int64_t{start} + steps;
    return static_cast<int32_t>(row >= n ? row - n : row);
  }
};

// In registers --------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Slot {
  T distance, x, y, z;
  int32_t index;
};

template <class T, int kThreads, int kPoints>
__global__ void __launch_bounds__(kThreads) sample_in_registers(Job<T> job) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32, "one warp reduces the results of all");
  GPU_SHARED(Slot<T>, slots, 2 * kWarps);  // two sets in turn: one barrier per pick is enough
  GPU_SHARED(unsigned, nearest_start, kWarps);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const Cloud<T> cloud(job, blockIdx.x);

  T x[kPoints], y[kPoints], z[kPoints], nearest[kPoints];
  unsigned after = ~0u;
#pragma unroll
  for (int j = 0; j < kPoints; ++j) {
    const int32_t i = t + j * kThreads;
    x[j] = y[j] = z[j] = T(0), nearest[j] = T(-1);
    if (i >= cloud.n) continue;
    const T *p = cloud.points + 3 * int64_t{i}, px = p[0], py = p[1], pz = p[2];
    after = min(after, cloud.distance_from_start(i, px, py, pz));
    nearest[j] = cloud.initial_distance(i, px, py, pz);
    if (finite(px, py, pz)) x[j] = px, y[j] = py, z[j] = pz;
  }
  after = warp_min(after);
  if (lane == 0) nearest_start[warp] = after;
  __syncthreads();
  after = warp_min(nearest_start[lane % kWarps]);
  if (after == ~0u) {  // nothing to pick
    for (int64_t s = t; s < cloud.k; s += kThreads) cloud.out[s] = -1;
    return;
  }
  const int32_t first = cloud.row_after_start(after);
  int32_t last = first;
  T px = cloud.points[3 * int64_t{first}], py = cloud.points[3 * int64_t{first} + 1], pz = cloud.points[3 * int64_t{first} + 2];
  if (t == 0 && cloud.k > 0) cloud.out[0] = cloud.base + first;

  int64_t step = 1;
  for (; step < cloud.k; ++step) {
    T best = T(-1);
    int32_t best_point = 0;
#pragma unroll
    for (int j = 0; j < kPoints; ++j) {
      const T d = squared(x[j] - px, y[j] - py, z[j] - pz);
      nearest[j] = t + j * kThreads == last ? T(-1) : d < nearest[j] ? d : nearest[j];
      if (nearest[j] > best) best = nearest[j], best_point = j;
    }
    const int32_t index = t + best_point * kThreads;
    const T largest = warp_largest(best);
    const unsigned lowest = warp_min(best == largest ? static_cast<unsigned>(index) : ~0u);
    Slot<T>* set = slots + (step & 1) * kWarps;
    if (static_cast<unsigned>(index) == lowest && best == largest) {
      Slot<T> slot{best, T(0), T(0), T(0), index};
#pragma unroll
      for (int j = 0; j < kPoints; ++j)
        if (j == best_point) slot.x = x[j], slot.y = y[j], slot.z = z[j];
      set[warp] = slot;
    }
    __syncthreads();
    const Slot<T>& mine = set[lane % kWarps];
    const T distance = mine.distance;
    const T farthest = warp_largest(distance);
    if (farthest < T(0)) break;  // all picked; the same in every thread
    last = static_cast<int32_t>(warp_min(distance == farthest ? static_cast<unsigned>(mine.index) : ~0u));
    const int winner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, distance == farthest && mine.index == last))) - 1;
    const Slot<T>& pick = set[winner];
    px = pick.x, py = pick.y, pz = pick.z;
    if (t == 0) cloud.out[step] = cloud.base + last;
  }
  for (int64_t s = step + t; s < cloud.k; s += kThreads) cloud.out[s] = cloud.parity ? cloud.base + first : -1;
}

// One launch per pick -------------------------------------------------------------------------------------------------------------------

constexpr int kStepThreads = 256, kMaxParts = 256;  // parts of a cloud; _run in geossl/ops/fps.py counts on it

template <class T>
struct Part {
  T distance;
  int64_t index;
};

// What lives in the workspace: the distance of every row, and two sets of the parts' results, used in turn.
template <class T>
struct Workspace {
  T* nearest;
  Part<T>* parts;
  int64_t batch;
  __device__ Part<T>* set(int64_t b, int64_t step) const { return parts + ((step & 1) * batch + b) * kMaxParts; }
};

// The best of the `count` results of one cloud, the same in every thread. Called by whole blocks.
template <class T>
__device__ Part<T> best_part(const Part<T>* parts, int count) {
  constexpr int kWarps = kStepThreads / 32;
  GPU_SHARED(Part<T>, of_warp, kWarps);
  const int t = threadIdx.x, lane = t & 31;
  Part<T> own = t < count ? parts[t] : Part<T>{T(-1), 0};
  for (int round = 0; round < 2; ++round) {
    const T largest = warp_largest(own.distance);
    const unsigned lowest = warp_min(own.distance == largest ? static_cast<unsigned>(own.index) : ~0u);
    own = {largest, static_cast<int64_t>(lowest)};
    if (round == 1) break;
    if (lane == 0) of_warp[t >> 5] = own;
    __syncthreads();
    own = of_warp[lane % kWarps];
  }
  return own;
}

// Sets the distances up and leaves the first pick as the result of the only part.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 4) begin_steps(Job<T> job, Workspace<T> space, int parts) {
  constexpr int kWarps = kStepThreads / 32;
  GPU_SHARED(unsigned, of_warp, kWarps);
  const int t = threadIdx.x, lane = t & 31;
  const int64_t b = blockIdx.x;
  const Cloud<T> cloud(job, b);
  T* nearest = space.nearest + job.clouds.begin(b);
  unsigned after = ~0u;
  for (int32_t i = t; i < cloud.n; i += kStepThreads) {
    const T *p = cloud.points + 3 * int64_t{i}, x = p[0], y = p[1], z = p[2];
    after = min(after, cloud.distance_from_start(i, x, y, z));
    nearest[i] = cloud.initial_distance(i, x, y, z);
  }
  after = warp_min(after);
  if (lane == 0) of_warp[t >> 5] = after;
  __syncthreads();
  after = warp_min(of_warp[lane % kWarps]);
  for (int part = t; part < parts; part += kStepThreads)
    space.set(b, 0)[part] = part == 0 && after != ~0u ? Part<T>{infinity<T>(), cloud.row_after_start(after)} : Part<T>{T(-1), 0};
}

// Writes pick `step` from the parts' results, and leaves those for the next pick.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 4) take_step(Job<T> job, Workspace<T> space, int parts, int64_t step) {
  constexpr int kWarps = kStepThreads / 32;
  GPU_SHARED(Part<T>, of_warp, kWarps);
  const int t = threadIdx.x, lane = t & 31, part = static_cast<int>(blockIdx.x % parts);
  const int64_t b = blockIdx.x / parts;
  const Cloud<T> cloud(job, b);
  const Part<T> pick = best_part(space.set(b, step), parts);
  const bool found = pick.distance >= T(0);
  if (part == 0 && t == 0 && step < cloud.k)
    cloud.out[step] = found ? cloud.base + pick.index : cloud.parity && step > 0 ? cloud.out[0] : -1;

  Part<T> best{T(-1), 0};
  if (found && step + 1 < cloud.k) {
    T* nearest = space.nearest + job.clouds.begin(b);
    const T *p = cloud.points + 3 * pick.index, px = p[0], py = p[1], pz = p[2];
    const int64_t begin = int64_t{cloud.n} * part / parts, end = int64_t{cloud.n} * (part + 1) / parts;
    for (int64_t i = begin + t; i < end; i += kStepThreads) {
      const T* q = cloud.points + 3 * i;
      const T d = squared(q[0] - px, q[1] - py, q[2] - pz), before = nearest[i];
      const T now = i == pick.index ? T(-1) : d < before ? d : before;
      nearest[i] = now;
      if (now > best.distance) best = {now, i};
    }
  }
  const T largest = warp_largest(best.distance);
  const unsigned lowest = warp_min(best.distance == largest ? static_cast<unsigned>(best.index) : ~0u);
  if (lane == 0) of_warp[t >> 5] = {largest, static_cast<int64_t>(lowest)};
  __syncthreads();
  if (t == 0) {
    Part<T> result = of_warp[0];
    for (int w = 1; w < kWarps; ++w)
      if (of_warp[w].distance > result.distance || (of_warp[w].distance == result.distance && of_warp[w].index < result.index)) result = of_warp[w];
    space.set(b, step + 1)[part] = result;
  }
}

template <class T>
cudaError_t sample_in_steps(const Job<T>& job, int64_t n, void* workspace, cudaStream_t stream) {
  const int64_t batch = job.clouds.batch;
  const auto parts = static_cast<int>(min(int64_t{kMaxParts}, (n + 4095) / 4096));
  auto* results = static_cast<Part<T>*>(workspace);
  const Workspace<T> space{reinterpret_cast<T*>(results + 2 * kMaxParts * batch), results, batch};
  cudaError_t error = gpu::launch(begin_steps<T>, dim3(static_cast<unsigned>(batch)), dim3(kStepThreads), 0, stream, job, space, parts);
  for (int64_t step = 0; step < job.options.k && error == cudaSuccess; ++step)
    error = gpu::launch(take_step<T>, dim3(static_cast<unsigned>(batch * parts)), dim3(kStepThreads), 0, stream, job, space, parts, step);
  return error;
}

template <class T, int kThreads, int kPoints>
cudaError_t launch_in_registers(const Job<T>& job, cudaStream_t stream) {
  return gpu::launch(sample_in_registers<T, kThreads, kPoints>, dim3(static_cast<unsigned>(job.clouds.batch)), dim3(kThreads), 0, stream, job);
}

}  // namespace
}  // namespace geossl

// See geossl/ops/fps.py for the arguments. n is the size of the largest cloud and k the largest number of picks, packed or not.
GEOSSL_API int geossl_fps_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                               int64_t batch, int64_t n, const int64_t* out_offsets, int64_t k, int64_t start, const int64_t* starts,
                               const uint8_t* mask, double min_sq_norm, void* workspace, int64_t* out) {
  using namespace geossl;
  if (batch < 0 || n < 0 || k < 0) return GEOSSL_INVALID_ARGUMENT;
  if (n > kMaxCloud) return GEOSSL_TOO_LARGE;
  if (batch == 0 || k == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    constexpr bool kDouble = sizeof(T) == 8;
    const Job<T> job{static_cast<const T*>(points), {offsets, lengths, batch, n}, {out_offsets, k, start, starts, mask, min_sq_norm}, out};
    if (n <= 512) return launch_in_registers<T, 128, 4>(job, as_stream(stream));
    if (n <= 2048) return launch_in_registers<T, 256, 8>(job, as_stream(stream));
    if constexpr (kDouble) {
      if (n <= 4096) return launch_in_registers<T, 512, 8>(job, as_stream(stream));
    } else {
      if (n <= 8192) return launch_in_registers<T, 512, 16>(job, as_stream(stream));
    }
    return sample_in_steps<T>(job, n, workspace, as_stream(stream));
  });
}
GEOSSL_PACKED(geossl_fps_cuda)
