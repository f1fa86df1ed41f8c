// Unit tests of native/src/laq-threads.h: no framework, the exit code is the number of failed checks.

#include "check.h"
#include "laq-threads.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

constexpr size_t MANY = 1 << 20;  // elements of a run that is worth a thread

static void test_each_runs_once() {
    for (const int n_threads : { -1, 0, 1, 2, 3, 16 }) {
        for (const uint32_t n : { 0u, 1u, 2u, 7u, 1000u }) {
            for (const size_t n_each : { (size_t) 0, (size_t) 1, MANY }) {
                std::vector<std::atomic<int>> n_runs(n);
                laq_parallel(n, n_each, n_threads, [&](uint32_t i) { ++n_runs[i]; });
                for (uint32_t i = 0; i < n; ++i) {
                    CHECK(n_runs[i] == 1);
                }
            }
        }
    }
}

static void test_what_is_thrown_comes_back() {
    for (const size_t n_each : { (size_t) 1, MANY }) {
        std::atomic<int> n_runs(0);
        std::string      what;
        try {
            laq_parallel(1000, n_each, 4, [&](uint32_t i) {
                ++n_runs;
                if (i >= 3) {
                    throw std::runtime_error("of a run");
                }
            });
        } catch (const std::runtime_error & e) {
            what = e.what();
        }
        CHECK(what == "of a run");
        // each thread ends with the first one it sees
        CHECK(n_runs >= 4 && n_runs <= 3 + 4);
    }
}

int main() {
    test_each_runs_once();
    test_what_is_thrown_comes_back();
    return n_failed;
}
