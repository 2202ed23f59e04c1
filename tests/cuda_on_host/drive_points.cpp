// Sampling, neighbours, grouping and Chamfer distance.
#include <algorithm>

#include "drive.h"

BOTH(fps, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const int64_t*, int64_t, int64_t, const int64_t*, const uint8_t*,
     double, void*, int64_t*);
BOTH(knn, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t, int64_t,
     double, int, void*, int64_t*);
BOTH(ball_query, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
     int64_t, double, const void*, int, int, void*, int64_t*, int64_t*);
BOTH(group, int64_t, const void*, int64_t, int64_t, const int64_t*, int64_t, const void*, void*);
BOTH(group_backward, int, const void*, int64_t, int64_t, int64_t, const int64_t*, int64_t, const int64_t*, const int64_t*, void*);
BOTH(neighbor_distance, int, const void*, int64_t, const void*, int64_t, int64_t, const int64_t*, int64_t, void*);
BOTH(neighbor_distance_backward, int, const void*, int64_t, const void*, int64_t, int64_t, const int64_t*, int64_t, const void*,
     const int64_t*, const int64_t*, void*, void*);
BOTH(chamfer, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t, int64_t,
     int64_t, int, int, int64_t*, void*, void*);
BOTH(chamfer_backward, int, const void*, const int64_t*, const int64_t*, int64_t, const void*, const int64_t*, const int64_t*, int64_t,
     int64_t, int64_t, int, int, const int64_t*, const void*, const int64_t*, const int64_t*, void*, void*, void*);

namespace {

using namespace drive;

template <class T>
void sample(int64_t n, int64_t k, double min_sq_norm, bool packed, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 3, sizes[] = {n, 0, n / 2}, rows = packed ? n + n / 2 : batch * n;
  const int64_t offsets[] = {0, n, n, n + n / 2}, kept[] = {0, k, k, k + std::min(k, n / 2)}, starts[] = {n - 1, 0, 3};
  const std::vector<T> p = points<T>(rows);
  std::vector<uint8_t> mask(static_cast<size_t>(rows), 1);
  for (size_t i = 0; i < mask.size(); i += 5) mask[i] = 0;
  std::vector<int64_t> out[2];
  for (bool cuda : kOnCuda) {
    std::vector<unsigned char> workspace(static_cast<size_t>(rows) * sizeof(T) + batch * 2 * 256 * 16);  // as geossl/ops/fps.py asks for
    out[cuda].assign(static_cast<size_t>(packed ? kept[3] : batch * k), -7);
    const int64_t *o = packed ? offsets : nullptr, *l = packed ? nullptr : sizes, *oo = packed ? kept : nullptr;
    check(0 == (cuda ? geossl_fps_cuda(0, nullptr, is_double, p.data(), o, l, batch, n, oo, k, 0, starts, mask.data(), min_sq_norm,
                                       workspace.data(), out[1].data())
                     : geossl_fps_cpu(2, is_double, p.data(), o, l, batch, n, oo, k, 0, starts, mask.data(), min_sq_norm, nullptr, out[0].data())),
          what);
  }
  check(equal(out[0], out[1]), what);
}

template <class T>
void search(int64_t q, int64_t n, int64_t k, double radius, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 2, lengths[] = {n, n / 3};
  const std::vector<T> query = points<T>(batch * q), p = points<T>(batch * n);
  const auto size = static_cast<size_t>(batch * q * k);
  std::vector<T> d[2];
  std::vector<int64_t> i[2], c[2];
  const auto reset = [&](bool cuda) { d[cuda].assign(size, T(-7)), i[cuda].assign(size, -7), c[cuda].assign(static_cast<size_t>(batch * q), -7); };
  for (bool cuda : kOnCuda) {
    reset(cuda);
    check(0 == (cuda ? geossl_knn_cuda(0, nullptr, is_double, query.data(), nullptr, nullptr, q, p.data(), nullptr, lengths, n, batch, k, radius, 1,
                                       d[1].data(), i[1].data())
                     : geossl_knn_cpu(2, is_double, query.data(), nullptr, nullptr, q, p.data(), nullptr, lengths, n, batch, k, radius, 1,
                                      d[0].data(), i[0].data())),
          what);
  }
  check(equal(d[0], d[1]) && equal(i[0], i[1]), what);
  for (int first : {0, 1}) {
    for (bool cuda : kOnCuda) {
      reset(cuda);
      check(0 == (cuda ? geossl_ball_query_cuda(0, nullptr, is_double, query.data(), nullptr, nullptr, q, p.data(), nullptr, lengths, n, batch, k,
                                                radius, nullptr, first, 1, d[1].data(), i[1].data(), c[1].data())
                       : geossl_ball_query_cpu(2, is_double, query.data(), nullptr, nullptr, q, p.data(), nullptr, lengths, n, batch, k, radius,
                                               nullptr, first, 1, d[0].data(), i[0].data(), c[0].data())),
            what);
    }
    check(equal(d[0], d[1]) && equal(i[0], i[1]) && equal(c[0], c[1]), what);
  }
}

template <class T>
void gather(int64_t channels, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 2, n = 13, queries = 7, k = 4, entries = queries * k;
  std::vector<T> features(static_cast<size_t>(batch * n * channels)), fill(static_cast<size_t>(channels), T(5)), out[2];
  for (T& v : features) v = static_cast<T>(uniform());
  std::vector<int64_t> index(static_cast<size_t>(batch * entries)), target, order, starts;
  for (size_t e = 0; e < index.size(); ++e) {
    index[e] = static_cast<int64_t>(uniform() * 14) - 1;
    target.push_back(index[e] < 0 ? -1 : static_cast<int64_t>(e) / entries * n + index[e]);
  }
  invert(target, batch * n, order, starts);
  const auto bytes = channels * static_cast<int64_t>(sizeof(T));
  for (auto& o : out) o.assign(static_cast<size_t>(batch * entries * channels), T(-7));
  check(0 == geossl_group_cpu(2, bytes, features.data(), n, batch, index.data(), entries, fill.data(), out[0].data()), what);
  check(0 == geossl_group_cuda(0, nullptr, bytes, features.data(), n, batch, index.data(), entries, fill.data(), out[1].data()), what);
  check(equal(out[0], out[1]), what);
  const std::vector<T> grad = out[0];
  for (auto& o : out) o.assign(features.size(), T(-7));
  check(0 == geossl_group_backward_cpu(2, is_double, grad.data(), channels, n, batch, index.data(), entries, nullptr, nullptr, out[0].data()), what);
  check(0 == geossl_group_backward_cuda(0, nullptr, is_double, grad.data(), channels, n, batch, index.data(), entries, order.data(), starts.data(),
                                        out[1].data()), what);
  check(equal(out[0], out[1]), what);

  const std::vector<T> query = points<T>(batch * queries), p = points<T>(batch * n);
  for (auto& o : out) o.assign(index.size(), T(-7));
  check(0 == geossl_neighbor_distance_cpu(2, is_double, query.data(), queries, p.data(), n, batch, index.data(), k, out[0].data()), what);
  check(0 == geossl_neighbor_distance_cuda(0, nullptr, is_double, query.data(), queries, p.data(), n, batch, index.data(), k, out[1].data()), what);
  check(equal(out[0], out[1]), what);
  std::vector<T> gq[2], gp[2];
  for (bool cuda : kOnCuda) {
    gq[cuda].assign(query.size(), T(-7)), gp[cuda].assign(p.size(), T(-7));
    check(0 == (cuda ? geossl_neighbor_distance_backward_cuda(0, nullptr, is_double, query.data(), queries, p.data(), n, batch, index.data(), k,
                                                              grad.data(), order.data(), starts.data(), gq[1].data(), gp[1].data())
                     : geossl_neighbor_distance_backward_cpu(2, is_double, query.data(), queries, p.data(), n, batch, index.data(), k, grad.data(),
                                                             nullptr, nullptr, gq[0].data(), gp[0].data())),
          what);
  }
  check(equal(gq[0], gq[1]) && equal(gp[0], gp[1]), what);
}

template <class T>
void chamfer(int64_t n, int64_t m, int64_t channels, int norm, int direction, const char* what) {
  const int is_double = sizeof(T) == 8;
  const int64_t batch = 3, x_lengths[] = {n, 0, n - 1}, x_rows = batch * n, y_rows = batch * m;
  const int64_t x_entries = direction == 2 ? 0 : x_rows, entries = x_entries + (direction == 1 ? 0 : y_rows);
  std::vector<T> x = points<T>(x_rows * channels), y = points<T>(y_rows * channels);
  x.resize(static_cast<size_t>(x_rows * channels)), y.resize(static_cast<size_t>(y_rows * channels));
  const std::vector<T> grad{T(1), T(2), T(3)};
  std::vector<int64_t> nearest[2], target, order, starts;
  std::vector<T> loss[2], gx[2], gy[2], distance(static_cast<size_t>(entries)), weights(2 * batch);
  for (bool cuda : kOnCuda) {
    nearest[cuda].assign(static_cast<size_t>(entries), -7), loss[cuda].assign(batch, T(-7));
    check(0 == (cuda ? geossl_chamfer_cuda(0, nullptr, is_double, x.data(), nullptr, x_lengths, n, y.data(), nullptr, nullptr, m, batch, channels, norm,
                                           direction, nearest[1].data(), distance.data(), loss[1].data())
                     : geossl_chamfer_cpu(2, is_double, x.data(), nullptr, x_lengths, n, y.data(), nullptr, nullptr, m, batch, channels, norm, direction,
                                          nearest[0].data(), nullptr, loss[0].data())),
          what);
  }
  check(equal(nearest[0], nearest[1]) && close(loss[0], loss[1]), what);
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t row = nearest[0][static_cast<size_t>(e)];
    target.push_back(row < 0 ? -1 : e < x_entries ? row : y_rows + row);
  }
  invert(target, x_rows + y_rows, order, starts);
  const bool patch = n <= 64 && m <= 64;
  for (bool cuda : kOnCuda) {
    gx[cuda].assign(x.size(), T(-7)), gy[cuda].assign(y.size(), T(-7));
    check(0 == (cuda ? geossl_chamfer_backward_cuda(0, nullptr, is_double, x.data(), nullptr, x_lengths, n, y.data(), nullptr, nullptr, m, batch,
                                                    channels, norm, direction, nearest[1].data(), grad.data(), patch ? nullptr : order.data(),
                                                    patch ? nullptr : starts.data(), weights.data(), gx[1].data(), gy[1].data())
                     : geossl_chamfer_backward_cpu(2, is_double, x.data(), nullptr, x_lengths, n, y.data(), nullptr, nullptr, m, batch, channels, norm,
                                                   direction, nearest[0].data(), grad.data(), nullptr, nullptr, nullptr, gx[0].data(),
                                                   gy[0].data())),
          what);
  }
  check(equal(gx[0], gx[1]) && equal(gy[0], gy[1]), what);
}

template <class T>
void small() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  sample<T>(70, 50, -1, false, "fps, 128 threads");
  sample<T>(70, 50, 0.4, true, "fps, packed, published skip");
  sample<T>(700, 6, -1, false, "fps, 256 threads");
  sample<T>(3000, 4, -1, true, "fps, 512 threads");
  sample<T>(8300, 3, 0.1, true, "fps, one launch per pick");
  search<T>(9, 70, 5, kInfinity, "neighbours, k = 5");
  search<T>(4, 70, 45, 0.5, "neighbours, k = 45");
  search<T>(3, 300, 200, kInfinity, "neighbours, k = 200");
  for (int64_t channels : {1, 2, 3, 4}) gather<T>(channels, "group");
  for (int norm : {0, 1, 2})
    for (int direction : {0, 1, 2}) chamfer<T>(17, 33, 3, norm, direction, "chamfer of patches");
  chamfer<T>(130, 270, 3, 0, 0, "chamfer, tiled");
  chamfer<T>(770, 800, 3, 0, 0, "chamfer, on the CPU by blocks");
  chamfer<T>(770, 800, 3, 2, 1, "chamfer, on the CPU by blocks, sums of differences");
  chamfer<T>(70, 9, 1, 0, 1, "chamfer of one channel");
  chamfer<T>(70, 9, 5, 2, 0, "chamfer of five channels");
  chamfer<T>(9, 70, 40, 1, 2, "chamfer of forty channels");
  chamfer<T>(9, 33, 4, 1, 2, "chamfer of patches of four channels");
}

// Large enough for the tree and the buckets of the CPU kernels, these in several shares; two threads must give what one gives.
void large() {
  const int64_t n = 6000, q = 4200, k = 6, picks = 300, many = 60000;
  const std::vector<float> p = points<float>(n), cloud = points<float>(many);
  std::vector<int64_t> index[2], picked[2], nearest[2];
  std::vector<float> distance[2];
  float loss[2];
  for (int threads : {1, 2}) {
    const int t = threads - 1;
    index[t].assign(static_cast<size_t>(q * k), -7), distance[t].assign(static_cast<size_t>(q * k), -7);
    picked[t].assign(static_cast<size_t>(picks), -7), nearest[t].assign(static_cast<size_t>(2 * n), -7);
    check(0 == geossl_knn_cpu(threads, 0, p.data(), nullptr, nullptr, q, p.data(), nullptr, nullptr, n, 1, k, 1e30, 0, distance[t].data(),
                              index[t].data()), "large knn");
    check(0 == geossl_fps_cpu(threads, 0, cloud.data(), nullptr, nullptr, 1, many, nullptr, picks, 0, nullptr, nullptr, -1, nullptr,
                              picked[t].data()), "large fps");
    check(0 == geossl_chamfer_cpu(threads, 0, p.data(), nullptr, nullptr, n, p.data() + 3, nullptr, nullptr, n - 1, 1, 3, 0, 0, nearest[t].data(),
                                  nullptr, &loss[t]), "large chamfer");
  }
  check(equal(index[0], index[1]) && equal(distance[0], distance[1]) && equal(picked[0], picked[1]) && equal(nearest[0], nearest[1]) &&
            loss[0] == loss[1], "large, threads");
}

void run() {
  small<float>();
  small<double>();
  large();
}
const Suite suite{&run};

}  // namespace
