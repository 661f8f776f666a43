// Numbers that a user sets in the environment.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

namespace cosface {

// Nothing where the variable is not set.
inline std::optional<int64_t> classes_in_environment(const char* name) {
  const char* wanted = std::getenv(name);
  if (wanted == nullptr) return {};
  char* end = nullptr;
  const int64_t classes = std::strtoll(wanted, &end, 10);
  if (end == wanted || *end != '\0' || classes <= 0) {
    throw std::invalid_argument(std::string(name) + " must be a positive number of classes, got '" + wanted +
                                "'.");
  }
  return classes;
}

}  // namespace cosface
