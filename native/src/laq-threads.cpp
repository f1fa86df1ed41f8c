#include "laq-threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

// elements that take longer than the start of a thread
constexpr size_t N_LEAST = 65536;

void laq_parallel(uint32_t n, size_t n_each, int n_threads, const std::function<void(uint32_t)> & run) {
    std::atomic<uint32_t> next(0);
    std::exception_ptr    failed;
    std::mutex            mutex;

    const auto work = [&] {
        try {
            for (uint32_t i = next++; i < n; i = next++) {
                run(i);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            failed = failed ? failed : std::current_exception();
            next   = n;
        }
    };

    const size_t n_most = std::min<size_t>(std::max(n_threads, 1), 1 + n * n_each / N_LEAST);

    std::vector<std::thread> threads;
    try {
        while (threads.size() + 1 < std::min<size_t>(n_most, n)) {
            threads.emplace_back(work);
        }
    } catch (const std::system_error &) {
        // no more threads: those that there are do it
    }
    work();
    for (std::thread & thread : threads) {
        thread.join();
    }
    if (failed) {
        std::rethrow_exception(failed);
    }
}
