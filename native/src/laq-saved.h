#pragma once

// A sequence outside of its cells: read from a saved state, or parked.

#include "laq-archive.h"
#include "laq-seq.h"

#include <cstdint>
#include <memory>
#include <vector>

// what a saved state says of one sequence, until its cells are there
struct laq_saved {
    int32_t                      seq_id;
    uint32_t                     n_resident;
    uint32_t                     n_mixed;  // cells below n_intact
    laq_seq                      seq;      // without pinned spans and history
    std::vector<int32_t>         origin;   // [n_heads][n_mixed], in order of the table's positions
    std::vector<float>           memory;   // the same, or empty
    std::vector<uint8_t>         ring;     // rows of the captured queries, by layer
    bool                         with_outputs = true;
    std::unique_ptr<laq_archive> archive;  // null if the state does not carry it
};

struct laq_parked {
    int32_t                      n_tokens;
    uint32_t                     n_resident;
    laq_seq                      seq;
    std::vector<uint8_t>         state;    // cells, their tables, captured queries: a saved state without the archive
    std::unique_ptr<laq_archive> archive;  // null without one
};
