#pragma once

// Shared by the files that implement laq.h: exceptions become a status and a text.

#include "laq-context.h"

#include <new>
#include <string>

void laq_set_last_error(const std::string & what);

template <typename F> laq_status laq_guarded(F && f) {
    try {
        f();
        return LAQ_STATUS_OK;
    } catch (const laq_error & e) {
        laq_set_last_error(e.what());
        return e.status;
    } catch (const std::bad_alloc &) {
        laq_set_last_error("out of host memory");
        return LAQ_STATUS_NO_MEMORY;
    } catch (const std::exception & e) {
        laq_set_last_error(e.what());
        return LAQ_STATUS_INTERNAL;
    }
}

inline void laq_check_seq(const laq_context * laq, int32_t seq_id) {
    laq_check(laq, "laq must not be NULL");
    laq_check(seq_id >= 0 && seq_id < (int32_t) laq->seqs.size(),
              "seq_id must be in [0, " + std::to_string(laq->seqs.size()) + ")");
}
