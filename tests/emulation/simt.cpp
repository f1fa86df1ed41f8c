#if defined(__APPLE__)
#    define _XOPEN_SOURCE 600  // ucontext
#    define _DARWIN_C_SOURCE
#endif

#include "simt.h"

#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace simt {

namespace {

constexpr size_t        CANARY_BYTES = 4096;
constexpr unsigned char CANARY       = 0xa5;

// Lanes of a SIMD group in one place, with what they hand over. Kept until the last of them has gone on.
struct meeting {
    uint32_t members = 0;
    uint32_t arrived = 0;
    uint32_t leaving = 0;  // those that may still read
    site     where   = {};

    alignas(16) unsigned char values[WIDTH][MAX_VALUE];

    bool open() const { return members && arrived != members; }
};

// a stack with a page below it that faults
class stack_memory {
  public:
    explicit stack_memory(size_t size) {
        const size_t page = (size_t) sysconf(_SC_PAGESIZE);
        bytes             = (size + page - 1) / page * page + page;
        base              = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
            throw error("no memory for a fiber's stack");
        }
    }

    stack_memory(const stack_memory &)             = delete;
    stack_memory & operator=(const stack_memory &) = delete;

    ~stack_memory() { munmap(base, bytes); }

    void * base;
    size_t bytes;
};

struct fiber {
    ucontext_t   context;
    position     pos;
    const site * waits = nullptr;
    bool         done  = false;
    meeting *    met   = nullptr;  // what it read last
    stack_memory stack;

    explicit fiber(size_t size) : stack(size) {}
};

struct machine {
    std::vector<std::unique_ptr<fiber>>                fibers;
    std::vector<std::vector<std::unique_ptr<meeting>>> meetings;  // by SIMD group; used again

    std::vector<unsigned>      ready;  // fibers that can run; those before `head` have run
    size_t                     head = 0;
    std::vector<unsigned char> memory;

    const std::function<void()> * kernel = nullptr;

    ucontext_t  caller;
    fiber *     current = nullptr;
    unsigned    n_done  = 0;
    unsigned    n_wait  = 0;  // at the group's barrier
    site        barrier = {};
    uint64_t    random  = 0;
    std::string problem;
};

machine * m = nullptr;

std::string text(const site & s) {
    const std::string file = s.file;
    return std::string(s.what) + " (" + file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(s.line) + ")";
}

// the next fiber that can run, or none
fiber * next_ready() {
    if (m->head == m->ready.size()) {
        m->ready.clear();
        m->head = 0;
        return nullptr;
    }
    if (m->random) {
        m->random ^= m->random << 13;
        m->random ^= m->random >> 7;
        m->random ^= m->random << 17;
        std::swap(m->ready[m->head], m->ready[m->head + m->random % (m->ready.size() - m->head)]);
    }
    return m->fibers[m->ready[m->head++]].get();
}

// what a group waits for that cannot go on
std::string describe_stuck() {
    std::string res = "threads wait for each other in different places:";
    std::string last;
    for (const auto & f : m->fibers) {
        const std::string now = f->done ? "has left" : text(*f->waits);
        if (now != last) {
            res += "\n  from thread " + std::to_string(f->pos.index) + ": " + now;
            last = now;
        }
    }
    return res;
}

[[noreturn]] void stop(const std::string & problem) {
    const position & p = m->current->pos;
    m->problem = problem + "\n  in thread " + std::to_string(p.index) + " of group " + std::to_string(p.group.x) + "," +
                 std::to_string(p.group.y) + "," + std::to_string(p.group.z);
    setcontext(&m->caller);
    abort();
}

// lets others run; returns when this fiber is ready again
void wait_at(const site & where) {
    fiber * self = m->current;
    self->waits  = &where;

    fiber * next = next_ready();
    if (!next) {
        stop(describe_stuck());
    }
    if (next != self) {
        m->current = next;
        swapcontext(&self->context, &next->context);
    }
    self->waits = nullptr;
}

// the end of a fiber
[[noreturn]] void leave() {
    fiber * self = m->current;
    self->done   = true;
    m->n_done++;
    if (m->n_wait > 0) {
        stop("a thread left while others wait at the " + text(m->barrier));
    }
    for (const auto & meet : m->meetings[self->pos.simd]) {
        if (meet->open() && (meet->members >> self->pos.lane & 1)) {
            stop("a thread left while other lanes wait for it at the " + text(meet->where));
        }
    }
    if (m->n_done == m->fibers.size()) {
        setcontext(&m->caller);
    }
    fiber * next = next_ready();
    if (!next) {
        stop(describe_stuck());
    }
    m->current = next;
    setcontext(&next->context);
    abort();
}

void enter() {
    std::string problem;
    try {
        (*m->kernel)();
    } catch (const std::exception & e) {
        problem = e.what();
    }
    if (!problem.empty()) {
        stop(problem);
    }
    leave();
}

bool same(const site & a, const site & b) {
    return a.line == b.line && strcmp(a.file, b.file) == 0 && strcmp(a.what, b.what) == 0;
}

// the open meeting that this lane comes to, or a fresh one
meeting & find_meeting(const fiber & self, uint32_t members, const site & where) {
    meeting * idle = nullptr;
    auto &    all  = m->meetings[self.pos.simd];
    for (const auto & meet : all) {
        if (meet->open() && meet->members == members && same(meet->where, where)) {
            return *meet;
        }
        if (!meet->open() && meet->leaving == 0) {
            idle = meet.get();
        }
    }
    if (!idle) {
        idle = all.emplace_back(new meeting).get();
    }
    idle->members = members;
    idle->arrived = 0;
    idle->where   = where;
    // what a lane does not hand over is NaN
    memset(idle->values, 0xff, sizeof(idle->values));
    return *idle;
}

void start_group(vec3 group, vec3 n_groups, vec3 n_threads) {
    m->n_done = m->n_wait = 0;
    m->ready.clear();
    m->head = 0;
    for (auto & of_simd : m->meetings) {
        of_simd.clear();
    }
    memset(m->memory.data(), 0xff, m->memory.size() - CANARY_BYTES);
    memset(m->memory.data() + m->memory.size() - CANARY_BYTES, CANARY, CANARY_BYTES);

    for (unsigned i = 0; i < n_threads.count(); ++i) {
        fiber &    f      = *m->fibers[i];
        const vec3 thread = { i % n_threads.x, i / n_threads.x % n_threads.y, i / (n_threads.x * n_threads.y) };

        f.pos  = { n_groups, n_threads, group, thread, i, i % WIDTH, i / WIDTH };
        f.done = false;
        f.met  = nullptr;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.base;
        f.context.uc_stack.ss_size = f.stack.bytes;
        f.context.uc_link          = nullptr;
        makecontext(&f.context, enter, 0);
        m->ready.push_back(i);
    }
}

void run_group(vec3 group, vec3 n_groups, vec3 n_threads) {
    start_group(group, n_groups, n_threads);
    m->current = next_ready();
    swapcontext(&m->caller, &m->current->context);
    if (!m->problem.empty()) {
        throw error(m->problem);
    }
    for (size_t i = m->memory.size() - CANARY_BYTES; i < m->memory.size(); ++i) {
        if (m->memory[i] != CANARY) {
            throw error("a group wrote past its memory");
        }
    }
}

}  // namespace

void run(vec3 n_groups, vec3 n_threads, const options & opts, const std::function<void()> & kernel) {
    if (m) {
        throw error("a kernel cannot start another one");
    }
    machine all;
    all.kernel = &kernel;
    all.random = opts.seed;
    all.memory.resize(opts.group_memory + CANARY_BYTES);
    all.meetings.resize((n_threads.count() + WIDTH - 1) / WIDTH);
    for (unsigned i = 0; i < n_threads.count(); ++i) {
        all.fibers.emplace_back(new fiber(opts.stack));
    }

    struct guard {
        ~guard() { m = nullptr; }
    } reset;

    m = &all;
    for (unsigned i = 0; i < n_groups.count(); ++i) {
        run_group({ i % n_groups.x, i / n_groups.x % n_groups.y, i / (n_groups.x * n_groups.y) }, n_groups, n_threads);
    }
}

const position & self() {
    return m->current->pos;
}

void * group_memory() {
    return m->memory.data();
}

void fail(const char * message) {
    stop(message);
}

uint32_t present(uint32_t mask) {
    const position & p    = m->current->pos;
    const unsigned   left = p.n_threads.count() - p.simd * WIDTH;
    return left >= WIDTH ? mask : mask & ((1u << left) - 1);
}

void group_wait(const site & where) {
    if (m->n_wait == 0) {
        m->barrier = where;
    }
    if (!same(m->barrier, where)) {
        stop("a thread is at the " + text(where) + " while others wait at the " + text(m->barrier));
    }
    if (m->n_done > 0) {
        stop("a thread waits at the " + text(where) + " and others have left");
    }
    fiber & self = *m->current;
    if (++m->n_wait == m->fibers.size()) {
        m->n_wait = 0;
        // all others wait here, so nothing else is ready
        for (unsigned i = 0; i < m->fibers.size(); ++i) {
            m->ready.push_back(i);
        }
    }
    self.waits = &where;
    wait_at(where);
}

const unsigned char * lanes_wait(const void * value, size_t size, uint32_t mask, const site & where) {
    fiber &        self    = *m->current;
    const unsigned lane    = self.pos.lane;
    const uint32_t members = present(mask);

    if (!(members >> lane & 1)) {
        stop("a lane comes to the " + text(where) + " without being in its mask");
    }
    if (self.met) {
        self.met->leaving &= ~(1u << lane);
    }
    meeting & meet = find_meeting(self, members, where);
    for (unsigned i = 0; i < WIDTH; ++i) {
        if ((members >> i & 1) && m->fibers[self.pos.simd * WIDTH + i]->done) {
            stop("a lane waits at the " + text(where) + " for one that has left");
        }
    }
    self.met = &meet;
    meet.arrived |= 1u << lane;
    if (size > 0) {
        memcpy(meet.values[lane], value, size);
    }
    if (meet.arrived == members) {
        meet.leaving = members;
        for (unsigned i = 0; i < WIDTH; ++i) {
            if (members >> i & 1) {
                m->ready.push_back(self.pos.simd * WIDTH + i);
            }
        }
    }
    wait_at(where);
    return meet.values[0];
}

}  // namespace simt
