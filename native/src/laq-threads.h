#pragma once

// Work of the host alone, by several threads. Internal to libllama.

#include <cstddef>
#include <cstdint>
#include <functional>

// run(i) for each i in [0, n), in any order. n_each: elements that one run looks at; where all of them are few, the
// calling thread does it alone. What a run throws is thrown again when all have ended, of several the first.
void laq_parallel(uint32_t n, size_t n_each, int n_threads, const std::function<void(uint32_t)> & run);
