// A test harness of one page, and memory whose every overrun is seen.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "lmcl.h"

// CHECK(condition, a, b, ...) counts, and prints a, b, ... where the condition does not hold.
#define CHECK(condition, ...) \
  ::cosface::test::check((condition), __FILE__, __LINE__, #condition, #__VA_ARGS__ __VA_OPT__(, ) __VA_ARGS__)

#if defined(__SANITIZE_ADDRESS__)
#define COSFACE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define COSFACE_ASAN 1
#endif
#endif

namespace cosface::test {

inline int64_t checks = 0, failures = 0;

template <typename... Values>
void check(bool holds, const char* file, int line, const char* condition, const char* names,
           const Values&... values) {
  ++checks;
  constexpr int64_t kPrinted = 20;
  if (holds || ++failures > kPrinted) return;
  std::cerr.precision(17);
  std::cerr << file << ':' << line << ": " << condition << " does not hold; " << names << " =";
  ((std::cerr << ' ' << values), ...);
  std::cerr << '\n';
}

// Runs the tests and returns the exit status: 0, 1, or kSkipped where this processor lacks the instruction set
// that COSFACE_CPU_ISA names.
inline int run(void (*tests)()) {
  constexpr int kSkipped = 77;
  const char* isa = std::getenv("COSFACE_CPU_ISA");
  try {
    instruction_set();
  } catch (const std::runtime_error& error) {
    std::cerr << error.what() << '\n';
    const bool optional = isa && std::string(isa) != "baseline";
    return optional ? kSkipped : 1;
  }
  tests();
  std::cout << instruction_set() << ": " << checks << " checks, " << failures << " failures\n";
  return failures || !checks;
}

// n elements, exactly: under AddressSanitizer on the heap, between its red zones; else, because a sanitizer stops
// loops from being vectorised, up against a page that cannot be touched, so that vector code is caught too. All
// bits start as 1, a nan in every dtype, so that what a kernel leaves unwritten is seen.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t n) : size_(n) {
    const size_t bytes = sizeof(T) * n;
#ifdef COSFACE_ASAN
    base_ = data_ = new T[n];
#else
    const size_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    mapped_ = body + page;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<char*>(base_) + body, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(static_cast<char*>(base_) + body - bytes);
#endif
    if (bytes) std::memset(static_cast<void*>(data_), 0xff, bytes);
  }
  Exact(int64_t n, T value) : Exact(n) { std::fill_n(data_, n, value); }
  Exact(const Exact& other) : Exact(other.size_) { std::copy_n(other.data_, size_, data_); }
  Exact& operator=(const Exact&) = delete;
  ~Exact() {
#ifdef COSFACE_ASAN
    delete[] data_;
#else
    munmap(base_, mapped_);
#endif
  }

  int64_t size() const { return size_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  operator T*() const { return data_; }
  bool same_bits(const Exact& other) const {
    return size_ == other.size_ && (!size_ || std::memcmp(data_, other.data_, sizeof(T) * size_) == 0);
  }

 private:
  int64_t size_;
  void* base_;
  size_t mapped_ = 0;
  T* data_;
};

extern "C" inline void on_fault(int) {
  constexpr char kMessage[] = "guard page touched\n";
  if (write(STDERR_FILENO, kMessage, sizeof(kMessage) - 1) > 0) _exit(1);
  _exit(2);
}

// Commits the error that the command line names; CTest sees by what is printed whether it was caught.
inline int run_negative(int argc, char** argv, const std::map<std::string, void (*)()>& modes) {
  const auto mode = modes.find(argc == 2 ? argv[1] : "");
  if (mode == modes.end()) {
    for (const auto& [name, body] : modes) std::cerr << name << '\n';
    return 2;
  }
#ifndef COSFACE_ASAN
  std::signal(SIGSEGV, on_fault);
#endif
  mode->second();
  std::cout << "survived\n";
  return 0;
}

}  // namespace cosface::test
