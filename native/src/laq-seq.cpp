#include "laq-seq.h"

#include <algorithm>

void laq_ring::init(uint32_t first_slot, uint32_t n_slots) {
    first = first_slot;
    pos.assign(n_slots, -1);
    output.assign(n_slots, laq_output::NONE);
}

void laq_ring::put(int32_t p, laq_output out) {
    pos[p % pos.size()]    = p;
    output[p % pos.size()] = out;
}

void laq_ring::settle(bool has_archive) {
    for (laq_output & out : output) {
        out = has_archive && out == laq_output::ALL ? out : laq_output::NONE;
    }
}

void laq_history::init(uint32_t n) {
    pos.assign(n, -1);
    token.assign(n, 0);
}

void laq_history::note(int32_t p, int32_t t) {
    if (!pos.empty()) {
        pos[p % pos.size()]     = p;
        token[p % token.size()] = t;
    }
}

std::vector<int32_t> laq_history::tail(int32_t begin, int32_t end, uint32_t n_most) const {
    const int32_t n = (int32_t) std::min<size_t>(n_most, pos.size());
    int32_t       p = end;
    while (p > begin && end - p < n && pos[(p - 1) % pos.size()] == p - 1) {
        --p;
    }
    std::vector<int32_t> res;
    for (; p < end; ++p) {
        res.push_back(token[p % token.size()]);
    }
    return res;
}

void laq_seq::read(int32_t n_tokens, laq_read_how how) {
    if (!phase.is(laq_phase::READING)) {
        phase = { laq_phase::READING, laq_read_how::WHOLE, n_tokens, 0 };
    }
    if (how == laq_read_how::ATTENDING || phase.attending()) {
        phase.how = how;
    }
}

void laq_seq::reset() {
    n_intact = 0;
    n_exact  = INT32_MAX;
    fitted   = false;
    phase    = {};
    ring.forget(0);
    history.forget(0);
}

void laq_seq::removed(int32_t p0) {
    ring.forget(p0);
    history.forget(p0);
    n_exact = p0 <= n_exact ? INT32_MAX : n_exact;
    if ((phase.is(laq_phase::READING) && p0 <= phase.begin) || (phase.is(laq_phase::WAITING) && p0 < phase.n_prompt)) {
        phase = {};
    }
}

void laq_seq::evicted(int32_t intact, int32_t n_end, bool by_probe, bool has_archive) {
    n_intact = intact;
    ring.settle(has_archive);
    ring.forget(n_end);
    if (by_probe || phase.probed()) {
        phase.how = by_probe ? laq_read_how::PROBED : laq_read_how::WHOLE;
    }
}
