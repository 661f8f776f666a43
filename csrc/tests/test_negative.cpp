// Proof that the sanitizers are alive: each mode commits one error on purpose, and passes if the error is named.
// The last two modes commit it inside the kernels and inside the driver, so that those are seen to be
// instrumented.
#include <thread>

#include "check.h"
#include "cpu/kernels.h"

namespace cosface::test {
namespace {

volatile int sink;

void heap() {
  Exact<int> values(7, 0);
  volatile int* data = values;
  volatile int past = 7;
  data[past] = 1;
}

void signed_overflow() {
  volatile int most = std::numeric_limits<int>::max();
  sink = most + 1;
}

void cast() {
  volatile float huge = 1e10f;
  sink = static_cast<int>(huge);
}

void division() {
  volatile float zero = 0;
  volatile float infinite = 1 / zero;
  (void)infinite;
}

void both(const std::function<void()>& body) {
  std::thread first(body), second(body);
  first.join();
  second.join();
}

void race() {
  int shared = 0;
  both([&shared] { shared = shared + 1; });
  sink = shared;
}

void kernel_overrun() {
  Exact<float> from(33, 1.0f);
  Exact<uint16_t> to(32);
  kernels<float>().store(from, 33, to, DType::kBFloat16);
}

// Every part at once on two threads, which no host may do.
void driver_race() {
  constexpr int64_t kN = 3, kClasses = 40, kD = 4;
  Exact<float> x(kN * kD, 1.0f), w(kClasses * kD, 1.0f), s(kN, 8.0f), results(5 * kN);
  Exact<int64_t> y(kN, 0);
  const Runtime runtime{2,
                        [](int64_t parts, const std::function<void(int64_t)>& body) {
                          for (int64_t part = 0; part < parts; ++part) both([&] { body(part); });
                        },
                        16};
  lmcl_forward<float>({x, y, s, kN, kD}, {w, DType::kFloat32, kClasses, kD}, 0.35f, {}, runtime,
                      {results, results + kN, results + 2 * kN, results + 3 * kN, results + 4 * kN});
}

}  // namespace
}  // namespace cosface::test

int main(int argc, char** argv) {
  using namespace cosface::test;
  return run_negative(argc, argv,
                      {{"heap", heap},
                       {"signed", signed_overflow},
                       {"cast", cast},
                       {"division", division},
                       {"race", race},
                       {"kernel_overrun", kernel_overrun},
                       {"driver_race", driver_race}});
}
