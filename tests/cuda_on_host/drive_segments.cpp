// Reductions over segments, and neighbours of sparse voxels.
#include <algorithm>

#include "drive.h"

BOTH(segment_sum, int, const void*, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, void*, int64_t*);
BOTH(segment_extreme, int, const void*, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, int, double, void*, int64_t*);
BOTH(segment_softmax, int, const void*, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, void*);
BOTH(segment_logsumexp, int, const void*, int64_t, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, void*);
BOTH(linear_max_backward, int, const void*, const int64_t*, const int64_t*, int64_t, int64_t, const void*, int64_t, int64_t, const void*, void*,
     void*);
BOTH(find_keys, const int64_t*, const int64_t*, int64_t, const int64_t*, const int64_t*, int64_t, const int64_t*, int64_t, int64_t*);
extern "C" int geossl_sort_keys_cpu(int, const int64_t*, int64_t, int, int64_t*, int64_t*);

namespace {

using namespace drive;

template <class T>
void reduce(int64_t rows, int64_t channels, int64_t size, const char* what) {
  const int is_double = sizeof(T) == 8;
  const auto entries = static_cast<size_t>(rows * channels), results = static_cast<size_t>(size * channels);
  std::vector<T> x(entries);
  for (T& v : x) v = static_cast<T>(uniform() * 4 - 2);
  if (rows > 5) x[static_cast<size_t>(5 * channels)] = std::numeric_limits<T>::quiet_NaN();
  std::vector<int64_t> index(static_cast<size_t>(rows)), order, starts;
  for (int64_t& i : index) i = static_cast<int64_t>(uniform() * static_cast<double>(size + 1)) - 1;
  invert(index, size, order, starts);
  std::vector<int64_t> splits = starts;  // the same sizes, the last one taking the rows left over
  splits.back() = rows;
  for (bool sorted : {false, true}) {
    std::vector<T> sum[2], best[2], soft[2], lse[2];
    std::vector<int64_t> count[2], arg[2];
    const int64_t *index_of = sorted ? nullptr : index.data(), *starts_of = sorted ? splits.data() : starts.data();
    const int64_t* rows_in_order = sorted ? nullptr : order.data();
    const auto call = [&](auto cpu, auto cuda, bool on_cuda, auto... rest) {
      check(0 == (on_cuda ? cuda(0, nullptr, is_double, x.data(), rows, channels, index_of, starts_of, rows_in_order, size, rest...)
                          : cpu(2, is_double, x.data(), rows, channels, index_of, starts_of, nullptr, size, rest...)),
            what);
    };
    for (int largest : {0, 1}) {
      for (bool cuda : kOnCuda) {
        sum[cuda].assign(results, T(-7)), best[cuda].assign(results, T(-7)), lse[cuda].assign(results, T(-7)), soft[cuda].assign(entries, T(0));
        count[cuda].assign(static_cast<size_t>(size), -7), arg[cuda].assign(results, -7);
        call(geossl_segment_sum_cpu, geossl_segment_sum_cuda, cuda, static_cast<void*>(sum[cuda].data()), largest ? count[cuda].data() : nullptr);
        call(geossl_segment_extreme_cpu, geossl_segment_extreme_cuda, cuda, largest, 3.0, static_cast<void*>(best[cuda].data()), arg[cuda].data());
        call(geossl_segment_softmax_cpu, geossl_segment_softmax_cuda, cuda, static_cast<void*>(soft[cuda].data()));
        call(geossl_segment_logsumexp_cpu, geossl_segment_logsumexp_cuda, cuda, static_cast<void*>(lse[cuda].data()));
      }
      check(equal(sum[0], sum[1]) && equal(count[0], count[1]) && equal(best[0], best[1]) && equal(arg[0], arg[1]) && equal(soft[0], soft[1]) &&
                equal(lse[0], lse[1]),
            what);
    }
  }
}

template <class T>
void linear_max(int64_t rows, int64_t channels, int64_t width, const char* what) {
  const std::vector<int64_t> splits{0, 0, rows / 3, rows / 3, rows};
  const int64_t size = static_cast<int64_t>(splits.size()) - 1;
  const auto random = [](int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& v : values) v = static_cast<T>(uniform() * 4 - 2);
    return values;
  };
  const std::vector<T> grad = random(size * channels), x = random(rows * width), weight = random(channels * width);
  std::vector<int64_t> arg(grad.size());
  for (size_t i = 0; i < arg.size(); ++i) {
    const size_t s = i / static_cast<size_t>(channels);
    const int64_t count = splits[s + 1] - splits[s];
    arg[i] = count == 0 || i % 7 == 0 ? -1 : splits[s] + static_cast<int64_t>(uniform() * static_cast<double>(count));
  }
  std::vector<T> grad_x[2], grad_weight[2];
  for (bool cuda : kOnCuda) {
    grad_x[cuda].assign(x.size(), T(-7)), grad_weight[cuda].assign(weight.size(), T(-7));
    const auto call = [&](auto run, auto... place) {
      check(0 == run(place..., sizeof(T) == 8, grad.data(), arg.data(), splits.data(), size, channels, x.data(), rows, width, weight.data(),
                     grad_x[cuda].data(), grad_weight[cuda].data()),
            what);
    };
    if (cuda) call(geossl_linear_max_backward_cuda, 0, static_cast<void*>(nullptr));
    else call(geossl_linear_max_backward_cpu, 2);
  }
  check(equal(grad_x[0], grad_x[1]) && equal(grad_weight[0], grad_weight[1]), what);
}

void find(int64_t count, const char* what) {
  std::vector<int64_t> keys(static_cast<size_t>(count)), sorted(keys.size()), order(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<int64_t>(i) * 3 + 5;
  for (size_t i = 1; i < keys.size(); ++i) std::swap(keys[i], keys[static_cast<size_t>(uniform() * static_cast<double>(i + 1))]);
  check(0 == geossl_sort_keys_cpu(2, keys.data(), count, 40, sorted.data(), order.data()), what);
  for (size_t i = 0; i < keys.size(); ++i) check(sorted[i] == keys[static_cast<size_t>(order[i])] && (i == 0 || sorted[i - 1] < sorted[i]), what);
  if (count > 1000) return;  // under ThreadSanitizer the threads of a GPU take minutes; this size is for the sort's own
  const int64_t shifts[] = {-6, -1, 0, 3, 300};
  for (const int64_t* rows : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(order.data())}) {
    std::vector<int64_t> out[2];
    for (bool cuda : kOnCuda) {
      out[cuda].assign(keys.size() * 5, -7);
      check(0 == (cuda ? geossl_find_keys_cuda(0, nullptr, sorted.data(), order.data(), count, sorted.data(), rows, count, shifts, 5, out[1].data())
                       : geossl_find_keys_cpu(2, sorted.data(), order.data(), count, sorted.data(), rows, count, shifts, 5, out[0].data())),
            what);
    }
    check(equal(out[0], out[1]), what);
  }
}

void run() {
  for (int64_t channels : {1, 3, 17}) {
    reduce<float>(70, channels, 9, "segments");
    reduce<double>(70, channels, 9, "segments, double");
  }
  reduce<float>(0, 3, 4, "segments without rows");
  reduce<float>(2000, 40, 7, "segments, two threads");
  linear_max<float>(30, 9, 17, "gradient of linear and maximum");
  linear_max<double>(30, 9, 17, "gradient of linear and maximum, double");
  linear_max<float>(0, 9, 17, "gradient of linear and maximum without rows");
  find(300, "keys");
  find(60000, "keys, two threads");
}
const Suite suite{&run};

}  // namespace
