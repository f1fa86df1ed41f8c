// Small kernels, right and wrong, for the tests of the emulator

#include "simt.h"

#include <cstdio>
#include <cstring>

using simt::self;

namespace {

float * memory() {
    return (float *) simt::group_memory();
}

bool first_half() {
    return self().lane < simt::WIDTH / 2;
}

// each thread's value, from the thread opposite
void reversed(float * out, bool wait) {
    const unsigned n       = self().n_threads.count();
    memory()[self().index] = (float) self().index;
    if (wait) {
        simt::group_barrier();
    }
    out[self().group.x * n + self().index] = memory()[n - 1 - self().index];
}

void halves(float * out) {
    const uint32_t mask = first_half() ? 0xffffu : 0xffff0000u;
    out[self().index]   = simt::sum((float) self().index, mask);
}

// sum, maximum, any lane above 40, the next lane's value; a group may end with half a SIMD group
void lanes(float * out) {
    float * mine = out + 4 * self().index;
    mine[0]      = simt::sum((float) self().index);
    mine[1]      = simt::max(-(float) self().index);
    mine[2]      = simt::any(self().index > 40);
    mine[3]      = simt::shuffle_xor((float) self().index, 1);
}

void different_barriers() {
    if (self().index < 32) {
        simt::group_barrier();
    } else {
        simt::group_barrier();
    }
}

void different_sums() {
    if (first_half()) {
        simt::sum(1.0f);
    } else {
        simt::sum(2.0f);
    }
}

void sum_and_barrier() {
    if (first_half()) {
        simt::sum(1.0f);
    } else {
        simt::group_barrier();
    }
}

void run_kernel(const char * name, float * out) {
    const auto is = [name](const char * other) { return strcmp(name, other) == 0; };
    if (is("reversed")) {
        reversed(out, true);
    } else if (is("no barrier")) {
        reversed(out, false);
    } else if (is("halves")) {
        halves(out);
    } else if (is("lanes")) {
        lanes(out);
    } else if (is("different barriers")) {
        different_barriers();
    } else if (is("different sums")) {
        different_sums();
    } else if (is("sum and barrier")) {
        sum_and_barrier();
    } else if (is("leaves before a barrier")) {
        self().index == 5 ? void() : simt::group_barrier();
    } else if (is("leaves before a sum")) {
        self().index == 5 ? 0.0f : simt::sum(1.0f);
    } else if (is("not in its mask")) {
        simt::sum(1.0f, 1u);
    } else if (is("absent lane")) {
        self().lane == 3 ? 0.0f : simt::shuffle(1.0f, 3, ~(1u << 3));
    } else if (is("past its memory")) {
        memory()[64] = 1.0f;
    } else {
        simt::fail("unknown kernel");
    }
}

}  // namespace

// 0, or 1 and what the emulator says
extern "C" int simt_run(const char * name, unsigned n_groups, unsigned n_threads, uint64_t seed, float * out,
                        char * message, size_t n_message) {
    simt::options opts;
    opts.seed         = seed;
    opts.group_memory = 64 * sizeof(float);
    try {
        simt::run({ n_groups, 1, 1 }, { n_threads, 1, 1 }, opts, [=] { run_kernel(name, out); });
        return 0;
    } catch (const simt::error & e) {
        snprintf(message, n_message, "%s", e.what());
        return 1;
    }
}
