#pragma once

// What a C function returns, thrown inside the library only; and faults that tests inject.

#include "laq.h"

#include <new>
#include <stdexcept>
#include <string>

struct laq_error : std::runtime_error {
    laq_status status;

    laq_error(laq_status status, const std::string & what) : std::runtime_error(what), status(status) {}
};

// an argument or a setting that cannot be
inline void laq_check(bool ok, const std::string & what) {
    if (!ok) {
        throw laq_error(LAQ_STATUS_INVALID_ARGUMENT, what);
    }
}

// laq_test_fail(): the countdown to the fault, 0 = none comes
extern thread_local uint32_t laq_faults;

// What follows may find no memory. Tests let it.
inline void laq_fault() {
    if (laq_faults > 0 && --laq_faults == 0) {
        throw std::bad_alloc();
    }
}
