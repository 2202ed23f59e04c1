// k nearest neighbours and ball query in large clouds: points along a Morton curve, 32 to a leaf, under boxes of which 32 lie under one box of
// the next level. A warp serves one query and tests 32 boxes at once, the nearest first. geossl/ops/_tree.py sorts and allocates.
//
// All clouds lie in one row of leaves; each begins with a leaf of its own, but boxes over leaves may reach into the next cloud. That costs at
// most two needless boxes per level: a box is only asked for bounds of what lies in it, and leaves of other clouds are never entered.
#include "search.cuh"

namespace geossl {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLevels = 7;       // 32^7 leaves
constexpr int kCellBits = 10;    // cells per axis in one round of sorting: 2^10
constexpr int kKeyBits = 3 * kCellBits + 1;  // the last one for invalid points, which come after all others of their group

// Keys ----------------------------------------------------------------------------------------------------------------------------------

// Integers that order like the numbers, and back; their smallest and largest are no number's.
__device__ __forceinline__ int ordered(float v) {
  const int bits = __float_as_int(v);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ long long ordered(double v) {
  const long long bits = __double_as_longlong(v);
  return bits ^ (bits >> 63 & 0x7fffffffffffffffll);
}
__device__ __forceinline__ float number(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }
__device__ __forceinline__ double number(long long bits) { return __longlong_as_double(bits ^ (bits >> 63 & 0x7fffffffffffffffll)); }
template <class T>
using Ordered = decltype(ordered(T{}));

template <class T>
struct Sorting {
  const T* points;
  Clouds clouds;
  int64_t rows, groups;
  const int64_t *order, *group;  // the row at each place so far, and the group of each place: what one round could not tell apart
  Ordered<T>* bounds;            // of each group: low and high x, y, z
  int64_t* key;

  // Whether the row at a place is a point that can be found.
  __device__ bool load(int64_t place, T* p) const {
    const int64_t row = order[place];
    return load(place, clouds.cloud_of(row), p);
  }
  __device__ bool load(int64_t place, int64_t b, T* p) const {
    const int64_t row = order[place];
    for (int axis = 0; axis < 3; ++axis) p[axis] = points[3 * row + axis];
    return row - clouds.begin(b) < clouds.size(b) && finite(p[0], p[1], p[2]);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) clear_bounds_kernel(Sorting<T> s) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < 6 * s.groups; i += int64_t{gridDim.x} * kThreads)
    s.bounds[i] = i % 6 < 3 ? ordered(infinity<T>()) : ordered(-infinity<T>());
}

// Each warp goes over kRun times 32 places and hands on what it knows of a group when the next begins: one group of all points, as in the
// first round, or as equal points make it, is then no crowd at one address. The order of the atomics does not matter for minima.
constexpr int kRun = 32;
template <class T>
__global__ void __launch_bounds__(kThreads) bounds_kernel(Sorting<T> s) {
  const int lane = threadIdx.x & 31;
  const int64_t begin = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kRun * 32 + lane;
  T low[3], high[3];
  int64_t group = -1;
  const auto hand_on = [&] {
    if (group < 0) return;
    for (int axis = 0; axis < 3; ++axis) {
      atomicMin(s.bounds + 6 * group + axis, ordered(low[axis]));
      atomicMax(s.bounds + 6 * group + 3 + axis, ordered(high[axis]));
    }
  };
  for (int64_t place = begin; place < begin + kRun * 32 && place < s.rows; place += 32) {
    T p[3];
    if (!s.load(place, p)) continue;
    if (s.group[place] != group) {
      hand_on();
      group = s.group[place];
      for (int axis = 0; axis < 3; ++axis) low[axis] = high[axis] = p[axis];
    }
    for (int axis = 0; axis < 3; ++axis) low[axis] = min(low[axis], p[axis]), high[axis] = max(high[axis], p[axis]);
  }
  __syncwarp();
  // When all lanes end in one group, one of them speaks for all.
  const int64_t first = __shfl_sync(kAllLanes, group, 0);
  if (__all_sync(kAllLanes, group == first) && first >= 0) {
    for (int axis = 0; axis < 3; ++axis)
      for (int offset = 16; offset > 0; offset >>= 1) {
        low[axis] = min(low[axis], __shfl_xor_sync(kAllLanes, low[axis], offset));
        high[axis] = max(high[axis], __shfl_xor_sync(kAllLanes, high[axis], offset));
      }
    if (lane > 0) group = -1;
  }
  hand_on();
}

// Spreads the lowest 10 bits three apart.
__device__ __forceinline__ unsigned spread_10_bits(unsigned v) {
  v = (v | v << 16) & 0x030000ffu;
  v = (v | v << 8) & 0x0300f00fu;
  v = (v | v << 4) & 0x030c30c3u;
  return (v | v << 2) & 0x09249249u;
}

// (group, cell of the group's bounding cube along a Morton curve).
template <class T>
__global__ void __launch_bounds__(kThreads) keys_kernel(Sorting<T> s) {
  constexpr int kLast = (1 << kCellBits) - 1;
  for (int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x; place < s.rows; place += int64_t{gridDim.x} * kThreads) {
    const int64_t group = s.group[place];
    const Ordered<T>* bounds = s.bounds + 6 * group;
    T p[3], extent = T(0);
    unsigned code = 1u << (kKeyBits - 1);
    if (s.load(place, p)) {
      for (int axis = 0; axis < 3; ++axis) extent = max(extent, number(bounds[3 + axis]) - number(bounds[axis]));
      const T scale = T(kLast) / extent;
      code = 0;  // all equal, or further apart than the type can tell: they stay in index order
      if (scale > T(0) && scale < infinity<T>())
        for (int axis = 0; axis < 3; ++axis)
          code |= spread_10_bits(static_cast<unsigned>(min((p[axis] - number(bounds[axis])) * scale, T(kLast)))) << axis;
    }
    s.key[place] = group << kKeyBits | code;
  }
}

// Tree ----------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Tree {
  T *x, *y, *z;             // of 32 slots per leaf
  int32_t* row;             // of each slot, within the cloud; -1 for none
  T* box[6];                // low x, y, z and high x, y, z of each node
  int32_t *first_row, *size;  // lowest row in a node, and points in it
  const int64_t* leaf_begin;  // first leaf of each cloud, and the end
  int64_t leaves;
  int levels;

  __host__ __device__ int64_t nodes_at(int level) const { return (((leaves - 1) >> 5 * level) + 32) & ~int64_t{31}; }  // whole warps
  __host__ __device__ int64_t level_begin(int level) const {
    int64_t begin = 0;
    for (int l = 0; l < level; ++l) begin += nodes_at(l);
    return begin;
  }
  __device__ void store_box(int64_t node, const T* low, const T* high, int32_t first, int32_t points) const {
    for (int axis = 0; axis < 3; ++axis) box[axis][node] = low[axis], box[3 + axis][node] = high[axis];
    first_row[node] = first, size[node] = points;
  }
};

// The box around 32 boxes, one per lane; the same in all lanes.
template <class T>
__device__ __forceinline__ void join(T* low, T* high, int32_t& first, int32_t& points) {
  for (int axis = 0; axis < 3; ++axis)
    for (int offset = 16; offset > 0; offset >>= 1) {
      low[axis] = min(low[axis], __shfl_xor_sync(kAllLanes, low[axis], offset));
      high[axis] = max(high[axis], __shfl_xor_sync(kAllLanes, high[axis], offset));
    }
  first = static_cast<int32_t>(warp_min(static_cast<unsigned>(first)));
  points = warp_sum(points);
}

// One warp per leaf, also for those that only fill up the last 32.
template <class T>
__global__ void __launch_bounds__(kThreads) leaves_kernel(Sorting<T> s, Tree<T> tree) {
  const int lane = threadIdx.x & 31;
  const int64_t nodes = tree.nodes_at(0), used = tree.leaf_begin[s.clouds.batch];
  for (int64_t leaf = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; leaf < nodes; leaf += int64_t{gridDim.x} * kWarps) {
    T low[3] = {infinity<T>(), infinity<T>(), infinity<T>()}, high[3] = {-infinity<T>(), -infinity<T>(), -infinity<T>()}, p[3] = {};
    int32_t row = -1;
    if (leaf < used) {
      const Clouds of_leaves{tree.leaf_begin, nullptr, s.clouds.batch, 0};
      const int64_t b = of_leaves.cloud_of(leaf), begin = s.clouds.begin(b), local = (leaf - tree.leaf_begin[b]) * 32 + lane;
      if (local < s.clouds.size(b) && begin + local < s.rows && s.load(begin + local, b, p)) row = static_cast<int32_t>(s.order[begin + local] - begin);
    }
    if (leaf < tree.leaves) {
      const int64_t slot = leaf * 32 + lane;
      tree.x[slot] = p[0], tree.y[slot] = p[1], tree.z[slot] = p[2], tree.row[slot] = row;
    }
    if (row >= 0)
      for (int axis = 0; axis < 3; ++axis) low[axis] = high[axis] = p[axis];
    int32_t first = row >= 0 ? row : 0x7fffffff, points = row >= 0;
    join(low, high, first, points);
    if (lane == 0) tree.store_box(leaf, low, high, first, points);
  }
}

// One warp per node of a level over the leaves.
template <class T>
__global__ void __launch_bounds__(kThreads) nodes_kernel(Tree<T> tree, int level) {
  const int lane = threadIdx.x & 31;
  const int64_t below = tree.nodes_at(level - 1), nodes = tree.nodes_at(level), begin = tree.level_begin(level), begin_below = begin - below;
  for (int64_t node = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; node < nodes; node += int64_t{gridDim.x} * kWarps) {
    T low[3] = {infinity<T>(), infinity<T>(), infinity<T>()}, high[3] = {-infinity<T>(), -infinity<T>(), -infinity<T>()};
    int32_t first = 0x7fffffff, points = 0;
    if (node * 32 < below) {
      const int64_t child = begin_below + node * 32 + lane;
      for (int axis = 0; axis < 3; ++axis) low[axis] = tree.box[axis][child], high[axis] = tree.box[3 + axis][child];
      first = tree.first_row[child], points = tree.size[child];
    }
    join(low, high, first, points);
    if (lane == 0) tree.store_box(begin + node, low, high, first, points);
  }
}

// Search --------------------------------------------------------------------------------------------------------------------------------

// 32 sister nodes on the way down.
template <class T>
struct Frame {
  T nearest[32];
  int64_t begin;         // the first of them, within its level
  unsigned open, covered;  // those still to be looked into; those entirely inside the ball
};

// Squared distances from a query to the nearest and the farthest corner of a box. For a point p in the box, low - q <= p - q <= high - q, and
// rounding is monotonic: the rounded differences, their squares and the sums of these, taken in the order of `squared`, keep the order. So
// `nearest` is never more than the distance computed for p, and `farthest` never less, to the last bit: pruning by them loses nothing.
template <class T>
__device__ __forceinline__ void box_distances(const Tree<T>& tree, int64_t node, const Query<T>& q, T& nearest, T& farthest) {
  const T at[3] = {q.x, q.y, q.z};
  T near[3], far[3];
  for (int axis = 0; axis < 3; ++axis) {
    const T below = tree.box[axis][node] - at[axis], above = at[axis] - tree.box[3 + axis][node];
    near[axis] = max(max(below, above), T(0));
    far[axis] = max(fabs(below), fabs(above));
  }
  nearest = squared(near[0], near[1], near[2]);
  farthest = squared(far[0], far[1], far[2]);
}

// One pass of one query through the tree, by a warp: leaves the best pairs after (last_d, last_i) in the list. With kFirst, pairs are (0, row).
template <class T, int kSlots, bool kFirst>
struct Walk {
  const Tree<T>& tree;
  const Query<T>& q;
  SortedList<T, kSlots>& list;
  Frame<T>* frames;  // one per level
  bool count;
  T last_d;
  int32_t last_i;
  int lane;
  int64_t from, to;    // leaves of the cloud
  int64_t inside = 0;  // points in the ball seen by this lane

  __device__ __forceinline__ void enter(int level, int64_t begin) {
    const int64_t node = begin + lane;
    T nearest = infinity<T>(), farthest = infinity<T>();
    bool open = node >= from >> 5 * level && node <= (to - 1) >> 5 * level;
    if (open) box_distances(tree, tree.level_begin(level) + node, q, nearest, farthest);
    open = open && nearest < q.limit && !(farthest < last_d);  // not empty, and not all found in an earlier pass
    const bool whole = node << 5 * level >= from && (node + 1) << 5 * level <= to;
    Frame<T>& frame = frames[level];
    frame.nearest[lane] = nearest;
    const unsigned all_open = __ballot_sync(kAllLanes, open), covered = __ballot_sync(kAllLanes, open && whole && farthest < q.limit);
    if (lane == 0) frame.begin = begin, frame.open = all_open, frame.covered = covered;
    __syncwarp();
  }

  // The node of a frame to look into next, or -1: the nearest that may hold a wanted point, or else any whose points must be counted.
  __device__ __forceinline__ int choose(int level) {
    Frame<T>& frame = frames[level];
    const T nearest = frame.nearest[lane];
    unsigned open = frame.open;
    const int64_t node = tree.level_begin(level) + frame.begin + lane;
    const bool mine = open >> lane & 1u;
    const int32_t first = mine ? tree.first_row[node] : 0x7fffffff;
    const bool wanted = mine && before(kFirst ? T(0) : nearest, first, list.worst_distance, list.worst_index);
    const unsigned all_wanted = __ballot_sync(kAllLanes, wanted);
    if (count) {
      const bool add = mine && !wanted && (frame.covered >> lane & 1u);
      if (add) inside += tree.size[node];
      open &= ~__ballot_sync(kAllLanes, add);
    } else {
      open = all_wanted;
    }
    int choice = __ffs(static_cast<int>(open)) - 1;
    if (all_wanted) {
      bool best;
      if constexpr (kFirst) best = static_cast<unsigned>(first) == warp_min(wanted ? static_cast<unsigned>(first) : ~0u);
      else best = nearest == warp_smallest(wanted ? nearest : infinity<T>());
      choice = __ffs(static_cast<int>(__ballot_sync(kAllLanes, wanted && best))) - 1;
    }
    __syncwarp();  // all have read `open`
    if (lane == 0) frame.open = choice < 0 ? 0u : open & ~(1u << choice);
    __syncwarp();
    return choice;
  }

  __device__ __forceinline__ void look_into_leaf(int64_t leaf) {
    const int64_t slot = leaf * 32 + lane;
    const int32_t row = tree.row[slot];
    const T d = squared(tree.x[slot] - q.x, tree.y[slot] - q.y, tree.z[slot] - q.z), key = kFirst ? T(0) : d;
    const bool hit = row >= 0 && d < q.limit && row != q.self;
    inside += count && hit;
    list.offer(hit && before(last_d, last_i, key, row), key, row, lane);
  }

  __device__ __forceinline__ void run() {
    int top = 0;  // the lowest level at which 32 sisters hold the whole cloud
    while (from >> 5 * (top + 1) != (to - 1) >> 5 * (top + 1)) ++top;
    enter(top, from >> 5 * (top + 1) << 5);
    for (int level = top; level <= top;) {
      const int choice = choose(level);
      if (choice < 0) {
        ++level;
      } else if (level == 0) {
        look_into_leaf(frames[0].begin + choice);
      } else {
        const int64_t child = (frames[level].begin + choice) * 32;
        enter(--level, child);
      }
    }
  }
};

template <class T, int kSlots, bool kFirst>
__global__ void __launch_bounds__(kThreads, kSlots == 1 ? 3 : 2) search_kernel(Search<T> s, Tree<T> tree) {
  GPU_SHARED(Frame<T>, frames, kWarps * kLevels);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < s.rows; row += int64_t{gridDim.x} * kWarps) {
    const Query<T> q(s, row);
    const int64_t from = tree.leaf_begin[q.cloud], to = min(tree.leaf_begin[q.cloud + 1], tree.leaves);
    T *distance = s.distance + row * s.k, last_d = T(-1);
    int64_t *index = s.index + row * s.k, found = 0, inside = 0;
    int32_t last_i = -1;
    for (bool more = q.n > 0 && from < to && finite(q.x, q.y, q.z); more;) {
      SortedList<T, kSlots> list;
      const int wanted = static_cast<int>(min(s.k - found, int64_t{list.kRanks}));
      list.clear(wanted, lane);
      Walk<T, kSlots, kFirst> walk{tree, q, list, frames + warp * kLevels, s.count && found == 0, last_d, last_i, lane, from, to};
      walk.run();
      inside += walk.inside;
      const int held = list.take(wanted, lane, [&](int rank, T d, int32_t i) {
        distance[found + rank] = kFirst ? q.distance_to(i) : d;
        index[found + rank] = q.base + i;
      });
      found += held;
      last_d = list.worst_distance, last_i = list.worst_index;
      more = held == wanted && found < s.k;
    }
    fill_free_slots(s, row, found, lane);
    if (!s.count) continue;
    inside = warp_sum(inside);
    if (lane == 0) s.count[row] = inside;
  }
}

template <class T>
cudaError_t launch_search(const Search<T>& s, const Tree<T>& tree, cudaStream_t stream) {
  if (s.rows == 0) return cudaSuccess;
  const dim3 grid = blocks_for(s.rows, kWarps), block(kThreads);
  if (s.k <= 32) {
    if (s.first) return gpu::launch(search_kernel<T, 1, true>, grid, block, 0, stream, s, tree);
    return gpu::launch(search_kernel<T, 1, false>, grid, block, 0, stream, s, tree);
  }
  if (s.first) return gpu::launch(search_kernel<T, 4, true>, grid, block, 0, stream, s, tree);
  return gpu::launch(search_kernel<T, 4, false>, grid, block, 0, stream, s, tree);
}

// The tree in its workspaces: coordinates and rows of the slots, boxes and numbers of the nodes.
template <class T>
Tree<T> make_tree(const int64_t* leaf_begin, int64_t leaves, void* coordinates, int32_t* rows, void* boxes, int32_t* numbers) {
  auto *at = static_cast<T*>(coordinates), *box = static_cast<T*>(boxes);
  Tree<T> tree{at, at + 32 * leaves, at + 64 * leaves, rows, {}, nullptr, nullptr, leaf_begin, leaves, 1};
  while ((leaves - 1) >> 5 * tree.levels > 0) ++tree.levels;
  const int64_t nodes = tree.level_begin(tree.levels);
  for (int i = 0; i < 6; ++i) tree.box[i] = box + i * nodes;
  tree.first_row = numbers, tree.size = numbers + nodes;
  return tree;
}

}  // namespace
}  // namespace geossl

// See geossl/ops/_tree.py for the arguments of all three.
GEOSSL_API int geossl_tree_keys_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                     int64_t n, int64_t batch, const int64_t* order, const int64_t* group, int64_t groups, void* bounds,
                                     int64_t* key) {
  using namespace geossl;
  if (batch < 0 || n < 0 || groups < 0) return GEOSSL_INVALID_ARGUMENT;
  const int64_t rows = offsets ? n : batch * n;
  if (rows >= int64_t{1} << (62 - kKeyBits)) return GEOSSL_TOO_LARGE;
  if (rows == 0) return GEOSSL_OK;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Sorting<T> s{static_cast<const T*>(points), {offsets, lengths, batch, n}, rows, groups, order, group,
                       static_cast<Ordered<T>*>(bounds), key};
    const cudaStream_t st = as_stream(stream);
    cudaError_t error = gpu::launch(clear_bounds_kernel<T>, blocks_for(6 * groups, kThreads), dim3(kThreads), 0, st, s);
    if (error == cudaSuccess) error = gpu::launch(bounds_kernel<T>, blocks_for(rows, kThreads * kRun), dim3(kThreads), 0, st, s);
    return error != cudaSuccess ? error : gpu::launch(keys_kernel<T>, blocks_for(rows, kThreads), dim3(kThreads), 0, st, s);
  });
}
GEOSSL_PACKED(geossl_tree_keys_cuda)

GEOSSL_API int geossl_tree_build_cuda(int device, void* stream, int is_double, const void* points, const int64_t* offsets, const int64_t* lengths,
                                      int64_t n, int64_t batch, const int64_t* order, const int64_t* leaf_begin, int64_t leaves,
                                      void* coordinates, int32_t* rows, void* boxes, int32_t* numbers) {
  using namespace geossl;
  if (batch < 0 || n < 0 || leaves < 1) return GEOSSL_INVALID_ARGUMENT;
  if (leaves >= int64_t{1} << 5 * (kLevels - 1)) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Sorting<T> s{static_cast<const T*>(points), {offsets, lengths, batch, n}, offsets ? n : batch * n, 0, order, nullptr, nullptr, nullptr};
    const Tree<T> tree = make_tree<T>(leaf_begin, leaves, coordinates, rows, boxes, numbers);
    const cudaStream_t st = as_stream(stream);
    cudaError_t error = gpu::launch(leaves_kernel<T>, blocks_for(tree.nodes_at(0), kWarps), dim3(kThreads), 0, st, s, tree);
    for (int level = 1; level < tree.levels && error == cudaSuccess; ++level)
      error = gpu::launch(nodes_kernel<T>, blocks_for(tree.nodes_at(level), kWarps), dim3(kThreads), 0, st, tree, level);
    return error;
  });
}
GEOSSL_PACKED(geossl_tree_build_cuda)

GEOSSL_API int geossl_tree_search_cuda(int device, void* stream, int is_double, const void* query, const int64_t* query_offsets,
                                       const int64_t* query_lengths, int64_t queries, const void* points, const int64_t* offsets,
                                       const int64_t* lengths, int64_t n, int64_t batch, int64_t k, double radius, const void* radii,
                                       int exclude_self, int first, int repeat, const int64_t* leaf_begin, int64_t leaves, void* coordinates,
                                       int32_t* rows, void* boxes, int32_t* numbers, void* distance, int64_t* index, int64_t* count) {
  using namespace geossl;
  if (batch < 0 || n < 0 || queries < 0 || k < 1 || leaves < 1) return GEOSSL_INVALID_ARGUMENT;
  if (leaves >= int64_t{1} << 5 * (kLevels - 1)) return GEOSSL_TOO_LARGE;
  return on_device(device, is_double, [&](auto zero) {
    using T = decltype(zero);
    const Search<T> s{static_cast<const T*>(query), static_cast<const T*>(points), {query_offsets, query_lengths, batch, queries},
                      {offsets, lengths, batch, n}, query_offsets ? queries : batch * queries, k, static_cast<T>(radius),
                      static_cast<const T*>(radii), exclude_self != 0, first != 0, repeat != 0, static_cast<T*>(distance), index, count};
    return launch_search(s, make_tree<T>(leaf_begin, leaves, coordinates, rows, boxes, numbers), as_stream(stream));
  });
}
GEOSSL_PACKED(geossl_tree_search_cuda)
