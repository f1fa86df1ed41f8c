#pragma once

// CHECK() for the unit tests, which need no framework: main() returns n_failed.

#include <cstdio>

static int n_failed = 0;

// not assert(): release builds define NDEBUG
#define CHECK(cond)                                                         \
    do {                                                                    \
        if (!(cond)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond); \
            ++n_failed;                                                     \
        }                                                                   \
    } while (0)
