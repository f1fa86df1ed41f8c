#pragma once

// A small emulator of a GPU's execution model: thread groups of fibers on one CPU thread.
//
// A fiber runs until it meets others: at a barrier of the group, at a barrier of its SIMD group, or where lanes exchange
// values. What could hang or be undefined on a device is an error here: a thread that leaves while others wait for it,
// lanes that wait for each other in different places, writes past the group's memory. Group memory starts as NaNs.
// With a seed the order in which fibers run is random, so that a missing barrier shows.
//
// A kernel may hold nothing that needs a destructor: after an error its fibers are dropped as they are.

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace simt {

constexpr unsigned WIDTH     = 32;  // lanes of a SIMD group
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr size_t   MAX_VALUE = 64;  // bytes a lane can hand over at once

struct vec3 {
    unsigned x = 1;
    unsigned y = 1;
    unsigned z = 1;

    unsigned count() const { return x * y * z; }
};

struct error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    uint64_t seed         = 0;         // 0: fibers run in the order of their indices
    size_t   group_memory = 0;         // bytes, for each group
    size_t   stack        = 1u << 18;  // bytes, for each fiber; there is a guard page
};

// Runs a grid, one group after the other. Throws `error`.
void run(vec3 n_groups, vec3 n_threads, const options & opts, const std::function<void()> & kernel);

//
// inside of a kernel
//

struct position {
    vec3     n_groups;
    vec3     n_threads;  // of a group
    vec3     group;
    vec3     thread;  // in its group
    unsigned index;   // thread, counted x first
    unsigned lane;
    unsigned simd;
};

const position & self();

void * group_memory();

// where in the source: threads that meet must meet in one place
struct site {
    const char * file;
    int          line;
    const char * what;
};

#define SIMT_SITE(what)  \
    ::simt::site {       \
        file, line, what \
    }
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

void group_wait(const site & where);

// Hands over a value and waits for the lanes of the mask. Lanes that the group does not have are not waited for.
// Returns the values of all lanes, MAX_VALUE bytes apart; they stay until this lane meets again.
const unsigned char * lanes_wait(const void * value, size_t size, uint32_t mask, const site & where);

// the lanes of the mask that exist in this SIMD group
uint32_t present(uint32_t mask = ALL_LANES);

// ends the run with an error
[[noreturn]] void fail(const char * message);

inline void group_barrier(SIMT_CALLER) {
    group_wait(SIMT_SITE("group barrier"));
}

inline void simd_barrier(uint32_t mask = ALL_LANES, SIMT_CALLER) {
    lanes_wait(nullptr, 0, mask, SIMT_SITE("SIMD barrier"));
}

// the values of all lanes
template <typename T> struct lanes {
    const unsigned char * data;

    T operator[](unsigned lane) const {
        T value;
        memcpy(&value, data + lane * MAX_VALUE, sizeof(T));
        return value;
    }
};

template <typename T> lanes<T> exchange(const T & value, uint32_t mask, const site & where) {
    static_assert(sizeof(T) <= MAX_VALUE, "too large to be handed over at once");
    return { lanes_wait(&value, sizeof(T), mask, where) };
}

// The value of another lane, which must be one that takes part. Out of range: the own value.
template <typename T> T shuffle(T value, unsigned lane, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    const lanes<T> all = exchange(value, mask, SIMT_SITE("shuffle"));
    if (lane >= WIDTH) {
        return value;
    }
    if (!(present(mask) >> lane & 1)) {
        fail("shuffle from a lane that does not take part");
    }
    return all[lane];
}

// within sub-groups of `width` lanes, as CUDA's __shfl_*_sync
template <typename T>
T shuffle_xor(T value, unsigned bits, uint32_t mask = ALL_LANES, unsigned width = WIDTH, SIMT_CALLER) {
    const unsigned lane = self().lane;
    const unsigned from = lane ^ bits;
    return shuffle(value, from / width == lane / width ? from : lane, mask, file, line);
}

template <typename T>
T shuffle_down(T value, unsigned delta, uint32_t mask = ALL_LANES, unsigned width = WIDTH, SIMT_CALLER) {
    const unsigned lane = self().lane;
    return shuffle(value, lane % width + delta < width ? lane + delta : lane, mask, file, line);
}

template <typename T>
T shuffle_up(T value, unsigned delta, uint32_t mask = ALL_LANES, unsigned width = WIDTH, SIMT_CALLER) {
    const unsigned lane = self().lane;
    return shuffle(value, lane % width >= delta ? lane - delta : lane, mask, file, line);
}

// a value of all lanes that take part, the same in all of them: pairs first, then pairs of pairs
template <typename T, typename F> T reduce(T value, F combine, uint32_t mask, const site & where) {
    const lanes<T> all  = exchange(value, mask, where);
    uint32_t       have = present(mask);

    T tree[WIDTH];
    for (unsigned i = 0; i < WIDTH; ++i) {
        tree[i] = all[i];
    }
    for (unsigned step = 1; step < WIDTH; step *= 2) {
        for (unsigned i = 0; i + step < WIDTH; i += 2 * step) {
            const bool a = have >> i & 1;
            const bool b = have >> (i + step) & 1;
            if (b) {
                tree[i] = a ? combine(tree[i], tree[i + step]) : tree[i + step];
                have |= 1u << i;
            }
        }
    }
    return tree[0];
}

template <typename T> T sum(T value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    return reduce(value, [](T a, T b) { return a + b; }, mask, SIMT_SITE("sum"));
}

template <typename T> T max(T value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    return reduce(value, [](T a, T b) { return a > b ? a : b; }, mask, SIMT_SITE("max"));
}

template <typename T> T min(T value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    return reduce(value, [](T a, T b) { return a < b ? a : b; }, mask, SIMT_SITE("min"));
}

// bit i: lane i takes part and holds true
inline uint32_t ballot(bool value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    const lanes<bool> all = exchange(value, mask, SIMT_SITE("ballot"));

    uint32_t bits = 0;
    for (unsigned i = 0; i < WIDTH; ++i) {
        bits |= (uint32_t) ((present(mask) >> i & 1) && all[i]) << i;
    }
    return bits;
}

inline bool any(bool value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    return ballot(value, mask, file, line) != 0;
}

inline bool all(bool value, uint32_t mask = ALL_LANES, SIMT_CALLER) {
    return ballot(!value, mask, file, line) == 0;
}

}  // namespace simt
