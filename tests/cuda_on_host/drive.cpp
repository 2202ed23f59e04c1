// Runs every suite of the drive_<group>.cpp files. Built with a sanitizer and run by test_sanitizers.py: `drive SEED` chooses the schedule of
// the CUDA threads. Exit code 0 = all equal.
#include <cstdlib>

#include "drive.h"

extern "C" void coh_set_seed(unsigned);
extern "C" int geossl_divide_grain_cpu(int64_t);

int main(int argc, char** argv) {
  geossl_divide_grain_cpu(int64_t{1} << 40);  // two threads for any input
  coh_set_seed(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 0);
  for (void (*run)() : drive::Suite::all()) run();
  std::printf(drive::failures ? "%d checks failed\n" : "all equal\n", drive::failures);
  return drive::failures != 0;
}
