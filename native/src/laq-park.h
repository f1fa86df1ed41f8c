#pragma once

// A sequence outside of the cells. Internal to libllama; laq.h is the interface.

#include "laq-archive.h"
#include "laq-cache.h"

struct laq_parked {
    int32_t  n_tokens;
    uint32_t n_resident;
    bool     pending;

    std::vector<uint8_t>  state;  // cells, their tables, captured queries: a saved state without the archive
    std::vector<laq_span> pinned;
    bool                  remembers;

    // as laq_recall_state has them; null without an archive
    std::unique_ptr<laq_archive> archive;
    std::vector<int32_t>         pos;
    std::vector<llama_token>     token;
};
