#include "laq-archive.h"

#include "laq-error.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <stdexcept>

// 64 bits over words of 8 bytes, in four lanes so that one multiplication does not wait for the one before
static uint64_t checksum(const uint8_t * data, size_t n) {
    constexpr uint64_t PRIME   = 0x9E3779B97F4A7C15ull;
    uint64_t           lane[4] = { PRIME, PRIME << 1, PRIME << 2, n };
    size_t             i       = 0;
    for (; i + sizeof(lane) <= n; i += sizeof(lane)) {
        uint64_t words[4];
        memcpy(words, data + i, sizeof(words));
        for (int l = 0; l < 4; ++l) {
            lane[l] = (lane[l] ^ words[l]) * PRIME;
            lane[l] ^= lane[l] >> 29;
        }
    }
    for (; i < n; ++i) {
        lane[3] = (lane[3] ^ data[i]) * PRIME;
    }
    uint64_t res = 0;
    for (const uint64_t x : lane) {
        res = (res ^ x) * PRIME;
        res ^= res >> 32;
    }
    return res;
}

static uint32_t count_bits(uint64_t bits) {
    uint32_t n = 0;
    for (; bits; bits &= bits - 1) {
        ++n;
    }
    return n;
}

static uint64_t bit_of(int32_t pos) {
    return 1ull << (pos % laq_archive::N_BLOCK);
}

laq_archive::laq_archive(const laq_archive_shape & shape, uint64_t limit, std::string folder,
                         std::function<void(const std::string &)> warn) :
    shape(shape), limit(limit), folder(std::move(folder)), warn(std::move(warn)) {
    size_t end = 0;
    for (const laq_archive_layer & layer : shape.layers) {
        for (const size_t row : layer.row) {
            offsets.push_back(end);
            end += layer.n_head_kv * N_BLOCK * row;
        }
        n_rows += layer.n_head_kv;
    }
    offsets.push_back(end);
    n_bytes = end;
}

laq_archive::~laq_archive() {
    close_file();
}

//
// what is there
//

bool laq_archive::has(int32_t pos) const {
    const size_t i = pos / N_BLOCK;
    return pos >= 0 && i < blocks.size() && (blocks[i].held & bit_of(pos)) != 0;
}

std::vector<int32_t> laq_archive::positions() const {
    std::vector<int32_t> res;
    res.reserve(blocks.size() * N_BLOCK);
    for (size_t i = 0; i < blocks.size(); ++i) {
        for (int32_t j = 0; j < N_BLOCK && blocks[i].held; ++j) {
            if (blocks[i].held >> j & 1) {
                res.push_back((int32_t) i * N_BLOCK + j);
            }
        }
    }
    return res;
}

uint32_t laq_archive::n_held() const {
    return std::count_if(blocks.begin(), blocks.end(), [](const block & b) { return b.held != 0; });
}

uint64_t laq_archive::n_archived() const {
    uint64_t n = 0;
    for (const block & b : blocks) {
        n += count_bits(b.held);
    }
    return n * n_rows;
}

//
// adding
//

void laq_archive::allocate(block & b, bool zero) {
    laq_fault();
    b.data.reset(new uint8_t[n_bytes]);
    ++n_in_memory;
    if (zero) {
        memset(b.data.get(), 0, n_bytes);
    }
}

void laq_archive::open(const std::vector<int32_t> & positions) {
    if (!positions.empty()) {
        blocks.resize(std::max<size_t>(blocks.size(), positions.back() / N_BLOCK + 1));
    }
    for (size_t i = 0; i < positions.size();) {
        const int32_t ib   = positions[i] / N_BLOCK;
        const size_t  from = i;
        while (i < positions.size() && positions[i] / N_BLOCK == ib) {
            ++i;
        }
        block & b = blocks[ib];
        if (!b.data && !(b.slot >= 0 && load(b))) {
            allocate(b, i - from < (size_t) N_BLOCK);
        }
    }
}

uint8_t * laq_archive::row(int32_t pos, uint32_t ikv, int part, uint32_t head) {
    uint8_t * rows = blocks[pos / N_BLOCK].data.get() + offsets[2 * ikv + part];
    return row_of(rows, head, pos, shape.layers[ikv].row[part]);
}

void laq_archive::close(const std::vector<int32_t> & positions) {
    for (const int32_t pos : positions) {
        blocks[pos / N_BLOCK].held |= bit_of(pos);
    }
    shrink();
}

// the oldest blocks leave the memory
void laq_archive::shrink() {
    for (size_t i = 0; i < blocks.size() && bytes_in_memory() > limit; ++i) {
        if (blocks[i].data) {
            store(blocks[i]);
        }
    }
}

//
// dropping
//

void laq_archive::drop(block & b) {
    n_in_memory -= b.data != nullptr;
    if (b.slot >= 0) {
        free_slots.push_back(b.slot);
    }
    b = block();
}

void laq_archive::lose(block & b, const std::string & why) {
    const uint64_t n = count_bits(b.held);
    drop(b);
    n_lost += n * n_rows;
    if (n > 0) {
        warn(std::to_string(n) + " archived tokens are lost: " + why);
    }
}

void laq_archive::forget(int32_t pos) {
    for (size_t i = std::max(pos, 0) / N_BLOCK; i < blocks.size(); ++i) {
        const int32_t first = (int32_t) i * N_BLOCK;
        blocks[i].held &= pos > first ? bit_of(pos) - 1 : 0;
        if (blocks[i].held == 0) {
            drop(blocks[i]);
        }
    }
    while (!blocks.empty() && blocks.back().held == 0) {
        blocks.pop_back();
    }
}

void laq_archive::clear() {
    blocks.clear();
    n_in_memory = 0;
    close_file();
}

//
// moving
//

void laq_archive::swap(laq_archive & other) {
    blocks.swap(other.blocks);
    std::swap(n_in_memory, other.n_in_memory);
    path.swap(other.path);
    std::swap(file, other.file);
    std::swap(n_slots, other.n_slots);
    free_slots.swap(other.free_slots);
}

std::unique_ptr<laq_archive> laq_archive::another() const {
    return std::make_unique<laq_archive>(shape, limit, folder, warn);
}

void laq_archive::take(laq_archive & other) {
    clear();
    swap(other);
}

//
// the file
//

void laq_archive::open_file() {
    std::random_device random;
    for (int i = 0; i < 16 && !file; ++i) {
        char name[48];
        snprintf(name, sizeof(name), "/recall-%08x%08x.kv", (unsigned) random(), (unsigned) random());
        path = folder + name;
        file = std::fopen(path.c_str(), "w+bx");
        if (!file && errno != EEXIST) {
            return;
        }
    }
    if (file) {
        // what was written has reached the file system, or the write says that it has not
        std::setvbuf(file, nullptr, _IONBF, 0);
#if !defined(_WIN32)
        // without a name it goes with the process, however that ends
        std::remove(path.c_str());
#endif
    }
}

void laq_archive::close_file() {
    if (file) {
        std::fclose(file);
#if defined(_WIN32)
        std::remove(path.c_str());
#endif
    }
    file    = nullptr;
    n_slots = 0;
    free_slots.clear();
}

bool laq_archive::seek(const block & b, size_t offset) {
    const int64_t at = b.slot * (int64_t) n_bytes + (int64_t) offset;
#if defined(_WIN32)
    return file && _fseeki64(file, at, SEEK_SET) == 0;
#else
    return file && fseeko(file, at, SEEK_SET) == 0;
#endif
}

// from memory to the file; lost if that cannot be
bool laq_archive::store(block & b) {
    if (folder.empty()) {
        lose(b, "kv_recall_limit is reached and there is no folder for a file");
        return false;
    }
    if (!file) {
        open_file();
    }
    if (file && b.slot < 0) {
        if (free_slots.empty()) {
            free_slots.push_back(n_slots++);
        }
        b.slot = free_slots.back();
        free_slots.pop_back();
    }
    errno = 0;
    if (!seek(b, 0) || std::fwrite(b.data.get(), 1, n_bytes, file) != n_bytes) {
        lose(b, (file ? path : folder) + " cannot be written: " + strerror(errno));
        return false;
    }
    b.sums.resize(offsets.size() - 1);
    for (size_t i = 0; i < b.sums.size(); ++i) {
        b.sums[i] = checksum(b.data.get() + offsets[i], offsets[i + 1] - offsets[i]);
    }
    b.data.reset();
    --n_in_memory;
    return true;
}

// from the file to memory; lost if it is not what was written
bool laq_archive::load(block & b) {
    std::vector<uint8_t> scratch;
    const uint32_t       index = &b - blocks.data();

    std::unique_ptr<uint8_t[]> data(new uint8_t[n_bytes]);
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
        const uint8_t * src = part(index, i / 2, i % 2, scratch);
        if (!src) {
            return false;
        }
        memcpy(data.get() + offsets[i], src, offsets[i + 1] - offsets[i]);
    }
    b.data = std::move(data);
    ++n_in_memory;
    return true;
}

const uint8_t * laq_archive::part(uint32_t index, uint32_t ikv, int part, std::vector<uint8_t> & scratch) {
    block &      b = blocks[index];
    const size_t i = 2 * ikv + part;
    const size_t n = offsets[i + 1] - offsets[i];
    if (b.data) {
        return b.data.get() + offsets[i];
    }
    scratch.resize(n);
    if (!seek(b, offsets[i]) || std::fread(scratch.data(), 1, n, file) != n) {
        lose(b, path + " is shorter than what was written");
        return nullptr;
    }
    if (checksum(scratch.data(), n) != b.sums[i]) {
        lose(b, path + " does not hold what was written");
        return nullptr;
    }
    return scratch.data();
}

//
// saved states
//

void laq_archive::visit(const std::function<void(uint32_t, uint64_t, const uint8_t *, size_t)> & visit,
                        bool                                                                     with_bytes) {
    for (size_t i = 0; i < blocks.size(); ++i) {
        if (blocks[i].held == 0) {
            continue;
        }
        if (!with_bytes) {
            visit(i, blocks[i].held, nullptr, n_bytes);
            continue;
        }
        const bool in_file = !blocks[i].data;
        if (in_file && !load(blocks[i])) {
            throw std::runtime_error("a part of the archive was lost while it was saved: save again");
        }
        visit(i, blocks[i].held, blocks[i].data.get(), n_bytes);
        if (in_file) {
            blocks[i].data.reset();
            --n_in_memory;
        }
    }
}

uint8_t * laq_archive::restore(uint32_t index) {
    blocks.resize(std::max<size_t>(blocks.size(), index + 1));
    allocate(blocks[index], false);
    return blocks[index].data.get();
}

void laq_archive::restored(uint32_t index, uint64_t held) {
    blocks[index].held = held;
    shrink();
}
