#pragma once

// kernels by their host names

#include <array>

struct launch {
    const void *          args;
    std::array<char *, 8> buffers;
};

// runs one thread
typedef void (*launcher)(const launch &);

launcher find_kernel(const char * name);
