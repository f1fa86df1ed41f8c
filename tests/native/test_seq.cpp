// laq-seq: phases, rings of queries, the history of tokens.

#include "check.h"
#include "laq-seq.h"

#include <algorithm>

static laq_seq make_seq() {
    laq_seq seq;
    seq.ring.init(100, 8);
    seq.history.init(6);
    return seq;
}

static void test_ring() {
    laq_seq seq = make_seq();
    for (int32_t p = 0; p < 11; ++p) {
        seq.ring.put(p, p < 9 ? laq_output::ALL : laq_output::CELLS);
    }
    CHECK(seq.ring.slot_of(10) == 102 && seq.ring.slot_of(8) == 100);
    CHECK(!seq.ring.has(2) && seq.ring.has(3) && seq.ring.has(10) && !seq.ring.has(11) && !seq.ring.has(-1));
    CHECK(seq.ring.output_of(8) == laq_output::ALL && seq.ring.output_of(9) == laq_output::CELLS);
    seq.ring.forget(10);
    CHECK(!seq.ring.has(10) && seq.ring.has(9));
    seq.ring.settle(true);
    CHECK(seq.ring.output_of(8) == laq_output::ALL && seq.ring.output_of(9) == laq_output::NONE);
    seq.ring.settle(false);
    CHECK(seq.ring.output_of(8) == laq_output::NONE);
}

static void test_history() {
    laq_seq seq = make_seq();
    for (int32_t p = 0; p < 10; ++p) {
        seq.history.note(p, 50 + p);
    }
    CHECK((seq.history.tail(0, 10, 3) == std::vector<int32_t>{ 57, 58, 59 }));
    CHECK(seq.history.tail(0, 10, 100).size() == 6);
    CHECK((seq.history.tail(8, 10, 100) == std::vector<int32_t>{ 58, 59 }));
    seq.history.forget(9);
    CHECK(seq.history.tail(0, 10, 3).empty());
    CHECK((seq.history.tail(0, 9, 2) == std::vector<int32_t>{ 57, 58 }));
    laq_history none;
    none.note(3, 4);
    CHECK(none.tail(0, 4, 3).empty());
}

static void test_reading() {
    laq_seq seq = make_seq();
    seq.read(40, laq_read_how::WHOLE);
    CHECK(seq.phase.is(laq_phase::READING) && seq.phase.begin == 40 && !seq.phase.probed());
    seq.evicted(60, 100, true, false);
    CHECK(seq.phase.probed() && seq.n_intact == 60);
    seq.read(100, laq_read_how::WHOLE);  // the next chunk of the same prompt
    CHECK(seq.phase.begin == 40 && seq.phase.probed());
    seq.removed(41);
    CHECK(seq.phase.probed());
    seq.evicted(70, 100, false, false);
    CHECK(seq.phase.is(laq_phase::READING) && !seq.phase.probed());
    seq.removed(40);
    CHECK(seq.phase.is(laq_phase::IDLE));
}

static void test_waiting() {
    laq_seq seq = make_seq();
    seq.read(10, laq_read_how::ATTENDING);
    CHECK(seq.phase.attending());
    seq.evicted(20, 30, false, true);
    CHECK(seq.phase.attending());
    seq.phase.kind     = laq_phase::WAITING;
    seq.phase.n_prompt = 50;
    seq.removed(50);
    CHECK(seq.phase.is(laq_phase::WAITING));
    seq.removed(49);
    CHECK(seq.phase.is(laq_phase::IDLE));
    seq.phase = { laq_phase::WAITING, laq_read_how::PROBED, 0, 50 };
    seq.read(60, laq_read_how::WHOLE);  // another prompt: the probes were of the one before
    CHECK(seq.phase.is(laq_phase::READING) && !seq.phase.probed() && seq.phase.begin == 60);
}

static void test_exact() {
    laq_seq seq = make_seq();
    seq.n_exact = 30;
    seq.removed(31);
    CHECK(seq.n_exact == 30);
    seq.removed(30);
    CHECK(seq.n_exact == INT32_MAX);
    seq.fitted   = true;
    seq.n_intact = 7;
    seq.reset();
    CHECK(seq.n_intact == 0 && !seq.fitted && seq.phase.is(laq_phase::IDLE));
}

int main() {
    test_ring();
    test_history();
    test_reading();
    test_waiting();
    test_exact();
    return std::min(n_failed, 100);
}
