// Radius search, relative neighbourhoods, interpolation and centrality suppression.
#include <algorithm>
#include <memory>

#include "drive.h"

BOTH(radius_count, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
     double, const void*, int, int64_t*);
BOTH(radius_fill, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
     double, const void*, int, const int64_t*, int64_t*, void*);
BOTH(group_relative, int, const void*, int64_t, int64_t, const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, double, void*);
BOTH(interpolate, int, const void*, int64_t, int64_t, int64_t, const int64_t*, const void*, int64_t, int64_t, void*);
BOTH(interpolate_backward, int, const void*, const void*, int64_t, int64_t, int64_t, const int64_t*, const void*, int64_t, int64_t,
     const int64_t*, const int64_t*, void*, void*);
BOTH(centrality_nms, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, double, int64_t, int64_t, int32_t*, bool*, int64_t*);

namespace {

using namespace drive;

template <class T>
void radius_search(int64_t q, int64_t n, double radius, int exclude_self, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 2, lengths[] = {n, n / 3}, query_lengths[] = {q - 1, q};
  const std::vector<T> query = points<T>(batch * q), p = points<T>(batch * n);
  std::vector<int64_t> splits[2], index[2];
  std::vector<T> distance[2];
  for (bool cuda : kOnCuda) {
    splits[cuda].assign(static_cast<size_t>(batch * q + 1), 0);
    int64_t* count = splits[cuda].data() + 1;
    check(0 == (cuda ? geossl_radius_count_cuda(0, nullptr, is_double, query.data(), nullptr, query_lengths, q, p.data(), nullptr, lengths, n,
                                                batch, radius, nullptr, exclude_self, count)
                     : geossl_radius_count_cpu(2, is_double, query.data(), nullptr, query_lengths, q, p.data(), nullptr, lengths, n, batch,
                                               radius, nullptr, exclude_self, count)),
          what);
    for (size_t r = 1; r < splits[cuda].size(); ++r) splits[cuda][r] += splits[cuda][r - 1];
    index[cuda].assign(static_cast<size_t>(splits[cuda].back()), -7), distance[cuda].assign(index[cuda].size(), T(-7));
    check(0 == (cuda ? geossl_radius_fill_cuda(0, nullptr, is_double, query.data(), nullptr, query_lengths, q, p.data(), nullptr, lengths, n,
                                               batch, radius, nullptr, exclude_self, splits[1].data(), index[1].data(), distance[1].data())
                     : geossl_radius_fill_cpu(2, is_double, query.data(), nullptr, query_lengths, q, p.data(), nullptr, lengths, n, batch,
                                              radius, nullptr, exclude_self, splits[0].data(), index[0].data(), distance[0].data())),
          what);
  }
  check(equal(splits[0], splits[1]) && equal(index[0], index[1]) && equal(distance[0], distance[1]), what);
}

template <class T>
void neighborhoods(int64_t channels, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 2, n = 13, queries = 7, k = 4, entries = batch * queries * k;
  std::vector<T> features(static_cast<size_t>(batch * n * channels)), grad(static_cast<size_t>(batch * queries * channels)), weight(entries);
  for (auto* values : {&features, &grad, &weight})
    for (T& v : *values) v = static_cast<T>(uniform());
  std::vector<int64_t> index(entries), target, order, starts;
  for (size_t e = 0; e < index.size(); ++e) {
    index[e] = static_cast<int64_t>(uniform() * 14) - 1;
    target.push_back(index[e] < 0 ? -1 : static_cast<int64_t>(e) / (queries * k) * n + index[e]);
  }
  invert(target, batch * n, order, starts);
  const std::vector<T> p = points<T>(batch * n), centers = points<T>(batch * queries);
  std::vector<T> relative[2], sum[2], gf[2], gw[2];
  for (bool cuda : kOnCuda) {
    relative[cuda].assign(static_cast<size_t>(entries * (3 + channels)), T(-7)), sum[cuda].assign(grad.size(), T(-7));
    gf[cuda].assign(features.size(), T(-7)), gw[cuda].assign(weight.size(), T(-7));
    check(0 == (cuda ? geossl_group_relative_cuda(0, nullptr, is_double, p.data(), n, batch, centers.data(), queries, features.data(), channels,
                                                  index.data(), k, 0.3, relative[1].data())
                     : geossl_group_relative_cpu(2, is_double, p.data(), n, batch, centers.data(), queries, features.data(), channels,
                                                 index.data(), k, 0.3, relative[0].data())),
          what);
    check(0 == (cuda ? geossl_interpolate_cuda(0, nullptr, is_double, features.data(), channels, n, batch, index.data(), weight.data(), queries,
                                               k, sum[1].data())
                     : geossl_interpolate_cpu(2, is_double, features.data(), channels, n, batch, index.data(), weight.data(), queries, k,
                                              sum[0].data())),
          what);
    check(0 == (cuda ? geossl_interpolate_backward_cuda(0, nullptr, is_double, grad.data(), features.data(), channels, n, batch, index.data(),
                                                        weight.data(), queries, k, order.data(), starts.data(), gf[1].data(), gw[1].data())
                     : geossl_interpolate_backward_cpu(2, is_double, grad.data(), features.data(), channels, n, batch, index.data(),
                                                       weight.data(), queries, k, nullptr, nullptr, gf[0].data(), gw[0].data())),
          what);
  }
  check(equal(relative[0], relative[1]) && equal(sum[0], sum[1]) && equal(gf[0], gf[1]) && close(gw[0], gw[1]), what);
}

template <class C>
void suppress(int64_t n, double radius, int64_t cap, const char* what) {
  const bool integers = std::is_same_v<C, int64_t>;
  const int type = integers ? 2 : sizeof(C) == 8;
  const int64_t batch = 3, offsets[] = {0, n, n, n + n / 2}, rows = offsets[3];
  std::vector<C> p(static_cast<size_t>(3 * rows));
  if constexpr (std::is_same_v<C, int64_t>)
    for (C& v : p) v = static_cast<C>(uniform() * 12) - 6;
  else p = points<C>(rows);
  std::vector<int64_t> count[2], kept[2];
  for (bool cuda : kOnCuda) {
    std::vector<int32_t> last(static_cast<size_t>(rows));
    const std::unique_ptr<bool[]> keep(new bool[static_cast<size_t>(rows)]());
    count[cuda].assign(static_cast<size_t>(rows), -7);
    const auto limit = static_cast<int64_t>(std::ceil(radius * radius));
    check(0 == (cuda ? geossl_centrality_nms_cuda(0, nullptr, type, p.data(), offsets, nullptr, rows, batch, radius, limit, cap, last.data(),
                                                  keep.get(), count[1].data())
                     : geossl_centrality_nms_cpu(2, type, p.data(), offsets, nullptr, rows, batch, radius, limit, cap, nullptr, keep.get(),
                                                 count[0].data())),
          what);
    kept[cuda].assign(keep.get(), keep.get() + rows);
  }
  check(equal(count[0], count[1]) && equal(kept[0], kept[1]), what);
}

template <class T>
void all() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  radius_search<T>(9, 70, 0.4, 1, "radius search");
  radius_search<T>(5, 130, kInfinity, 0, "radius search of everything");
  radius_search<T>(3, 300, 0.9, 0, "radius search, long rows");
  for (int64_t channels : {1, 5, 33}) neighborhoods<T>(channels, "relative neighbourhoods and interpolation");
  suppress<T>(90, 0.6, 1000, "suppression");
  suppress<T>(40, 0.6, 7, "suppression with a limit");
  suppress<T>(40, kInfinity, 1000, "suppression of everything");
}

// Large enough for the tree of the CPU kernel.
void large() {
  const int64_t n = 6000;
  const std::vector<float> p = points<float>(n);
  std::vector<int64_t> splits[2], index[2];
  std::vector<float> distance[2];
  for (int threads : {1, 2}) {
    const int t = threads - 1;
    splits[t].assign(n + 1, 0);
    check(0 == geossl_radius_count_cpu(threads, 0, p.data(), nullptr, nullptr, n, p.data(), nullptr, nullptr, n, 1, 0.1, nullptr, 1,
                                       splits[t].data() + 1), "large radius search");
    for (size_t r = 1; r < splits[t].size(); ++r) splits[t][r] += splits[t][r - 1];
    index[t].assign(static_cast<size_t>(splits[t].back()), -7), distance[t].assign(index[t].size(), -7);
    check(0 == geossl_radius_fill_cpu(threads, 0, p.data(), nullptr, nullptr, n, p.data(), nullptr, nullptr, n, 1, 0.1, nullptr, 1,
                                      splits[t].data(), index[t].data(), distance[t].data()), "large radius search");
  }
  check(equal(splits[0], splits[1]) && equal(index[0], index[1]) && equal(distance[0], distance[1]), "large radius search, threads");
}

void run() {
  all<float>();
  all<double>();
  suppress<int64_t>(90, 5, 1000, "suppression of voxels");
  suppress<int64_t>(40, 6, 9, "suppression of voxels with a limit");
  large();
}
const Suite suite{&run};

}  // namespace
