#pragma once

// One sequence: its phase, which queries are captured, which tokens were decoded last. Pure bookkeeping: no ggml, no
// llama.

#include "laq.h"

#include <cstdint>
#include <vector>

// how the tokens of a prompt see what has been evicted
enum class laq_read_how : uint8_t {
    WHOLE,      // nothing has been evicted since the prompt began, or only by its own last queries
    PROBED,     // the last eviction was by a probe: the next one joins its scores to those of this one
    ATTENDING,  // the tokens attend to the archive as well
};

// what a sequence is doing
struct laq_phase {
    enum kind_t : uint8_t {
        IDLE,
        READING,  // laq_prompt_next() was called, laq_prompt_end() was not
        WAITING,  // an eviction waits for its deferred lookahead
    };

    kind_t       kind     = IDLE;
    laq_read_how how      = laq_read_how::WHOLE;
    int32_t      begin    = 0;  // position of the prompt's first token
    int32_t      n_prompt = 0;  // WAITING: position behind the prompt's last token

    bool is(kind_t k) const { return kind == k; }
    bool probed() const { return kind != IDLE && how == laq_read_how::PROBED; }
    bool attending() const { return kind != IDLE && how == laq_read_how::ATTENDING; }
};

// what an output in a ring tells: the attention that a query got
enum class laq_output : uint8_t {
    NONE,   // nothing that holds now
    CELLS,  // its attention to what the cells hold
    ALL,    // its attention to all tokens, archived ones included
};

// positions >= p0 become -1, none
inline void laq_forget_from(std::vector<int32_t> & pos, int32_t p0) {
    for (int32_t & p : pos) {
        p = p >= p0 ? -1 : p;
    }
}

// Captured queries and outputs of one sequence, or of a probe: the slot of position p is first + p % size.
struct laq_ring {
    uint32_t                first = 0;
    std::vector<int32_t>    pos;     // position of the query in each slot, -1 = none
    std::vector<laq_output> output;  // of each slot

    void init(uint32_t first_slot, uint32_t n_slots);

    uint32_t   size() const { return (uint32_t) pos.size(); }
    int32_t    slot_of(int32_t p) const { return (int32_t) first + p % (int32_t) pos.size(); }
    bool       has(int32_t p) const { return p >= 0 && pos[p % pos.size()] == p; }
    laq_output output_of(int32_t p) const { return output[p % pos.size()]; }

    void put(int32_t p, laq_output out);
    void forget(int32_t p0) { laq_forget_from(pos, p0); }

    // An eviction is done: outputs from the cells tell nothing of what the cells hold now. Without an archive nor do
    // the others, since nothing holds what they saw.
    void settle(bool has_archive);
};

// The last tokens decoded, to be read again: that of position p is in slot p % size.
struct laq_history {
    std::vector<int32_t> pos;
    std::vector<int32_t> token;

    void init(uint32_t n);
    void note(int32_t p, int32_t t);
    void forget(int32_t p0) { laq_forget_from(pos, p0); }

    // the tokens of the last positions before `end` that are known, none before `begin`, at most n_most
    std::vector<int32_t> tail(int32_t begin, int32_t end, uint32_t n_most) const;
};

// Cells of positions below n_intact hold different tokens in different heads. From there on every head holds the token
// that the cell table names. Invariant: in order of the table's positions, those of a head ascend.
struct laq_seq {
    int32_t   n_intact = 0;
    int32_t   n_exact  = INT32_MAX;  // tokens from here on were decoded from the cells alone, after an eviction
    bool      fitted   = false;      // V of a cell below n_intact may not be what was computed for its token
    laq_phase phase;
    std::vector<laq_span> pinned;
    laq_ring              ring;
    laq_history           history;

    // laq_prompt_next(): the prompt begins with the first call
    void read(int32_t n_tokens, laq_read_how how);

    // all tokens are removed, or those from p0 on
    void reset();
    void removed(int32_t p0);

    // an eviction is done, all tokens from n_end on are dropped
    void evicted(int32_t intact, int32_t n_end, bool by_probe, bool has_archive);
};
