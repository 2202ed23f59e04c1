// Rotary position encoding.
#include "drive.h"

BOTH(rope_2d, int, const void*, int64_t, int64_t, int64_t, int64_t, int64_t, const void*, int64_t, int, void*);

namespace {

using namespace drive;

// Queries inside a joint qkv, whose arrays end with them. T are the numbers in memory, W those of the table.
template <class T, class W>
void rope(int type, int64_t images, int64_t positions, int64_t heads, int64_t dim, const char* what) {
  const int64_t rows = images * positions, stride = 3 * heads * dim;
  std::vector<T> x(static_cast<size_t>(rows > 0 ? (rows - 1) * stride + heads * dim : 0));
  for (T& v : x) v = static_cast<T>(sizeof(T) == 2 ? uniform() * 65536 : uniform() * 4 - 2);  // bits of any number, NaN as well
  std::vector<W> table(static_cast<size_t>(positions * dim));
  for (W& v : table) v = static_cast<W>(uniform() * 2 - 1);
  for (int inverse : {0, 1}) {
    std::vector<T> out[2];
    for (bool cuda : kOnCuda) {
      out[cuda].assign(static_cast<size_t>(rows * heads * dim), T(7));
      const auto call = [&](auto run, auto... place) {
        check(0 == run(place..., type, x.data(), stride, dim, rows, heads, dim, table.data(), positions, inverse, out[cuda].data()), what);
      };
      if (cuda) call(geossl_rope_2d_cuda, 0, nullptr);
      else call(geossl_rope_2d_cpu, 2);
    }
    check(equal(out[0], out[1]), what);
  }
}

void run() {
  for (int64_t dim : {4, 36, 64, 520}) {
    rope<float, float>(0, 3, 5, 3, dim, "rope");
    rope<double, double>(1, 2, 3, 2, dim, "rope, double");
    rope<uint16_t, float>(2, 2, 3, 2, dim, "rope, float16");
    rope<uint16_t, float>(3, 2, 3, 2, dim, "rope, bfloat16");
  }
  rope<float, float>(0, 0, 5, 3, 8, "rope without rows");
  rope<float, float>(0, 2, 5, 0, 8, "rope without heads");
}
const Suite suite{&run};

}  // namespace
