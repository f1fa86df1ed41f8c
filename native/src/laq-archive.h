#pragma once

// K and V of the archived tokens of one sequence: in host memory up to a limit, then in a file. No ggml, no llama.
//
// A token is archived whole: its rows of all layers and KV heads at once, in blocks of N_BLOCK positions. Where a row
// lies says whose it is: [block][layer][K, V][KV head][position in the block]. A bit says which positions are held. A
// block in the file has a checksum for each part; a block whose checksum differs is lost and never given out.

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

// bytes of the rows of one KV head
struct laq_archive_layer {
    uint32_t n_head_kv;
    size_t   row[2];  // K, V
};

// what an archive holds rows of
struct laq_archive_shape {
    std::vector<laq_archive_layer> layers;
    int32_t                        type[2];  // enum ggml_type of the rows of K and V
};

class laq_archive {
  public:
    static constexpr int32_t N_BLOCK = 64;  // positions of a block: the bits of `held`

    // limit: bytes in host memory, UINT64_MAX = any. folder: of the file, "" = none, and the oldest blocks beyond the
    // limit are lost. warn: is told what was lost
    laq_archive(const laq_archive_shape & shape, uint64_t limit, std::string folder,
                std::function<void(const std::string &)> warn);
    ~laq_archive();

    laq_archive(const laq_archive &)             = delete;
    laq_archive & operator=(const laq_archive &) = delete;

    bool                 has(int32_t pos) const;
    bool                 in_memory(uint32_t block) const { return block < blocks.size() && blocks[block].data; }
    bool                 has_block(uint32_t block) const { return block < blocks.size() && blocks[block].held != 0; }
    std::vector<int32_t> positions() const;  // ascending
    int32_t              type(int part) const { return shape.type[part]; }

    // Add tokens, in three steps: room for their positions (ascending, none is held); the caller writes each row;
    // close.
    void      open(const std::vector<int32_t> & positions);
    uint8_t * row(int32_t pos, uint32_t ikv, int part, uint32_t head);
    void      close(const std::vector<int32_t> & positions);

    // The rows of one part of a block: [n_head_kv][N_BLOCK]; read from the file into scratch where they are there.
    // nullptr: the file does not hold what was written, and the block is lost.
    const uint8_t * part(uint32_t block, uint32_t ikv, int part, std::vector<uint8_t> & scratch);

    // one of them. n_row: its bytes
    template <typename T> static T * row_of(T * part, uint32_t head, int32_t pos, size_t n_row) {
        return part + ((size_t) head * N_BLOCK + pos % N_BLOCK) * n_row;
    }

    void forget(int32_t pos);  // positions from here on are gone
    void clear();

    // an empty archive with the same settings
    std::unique_ptr<laq_archive> another() const;
    // Hold what another one holds, which is empty then. Nothing is copied or read from a file, and nothing fails.
    // n_lost of both stays.
    void take(laq_archive & other);

    // Call visit(index, held, bytes, n_bytes) for every block that a saved state carries. with_bytes = false: bytes is
    // NULL and nothing is read from the file. Throws what a reader of the file finds.
    void visit(const std::function<void(uint32_t, uint64_t, const uint8_t *, size_t)> & visit, bool with_bytes = true);
    // Add a block that visit() gave, in two steps: the caller writes its block_bytes(), then says which positions it
    // holds.
    uint8_t * restore(uint32_t index);
    void      restored(uint32_t index, uint64_t held);

    bool     can_hold() const { return limit >= n_bytes || !folder.empty(); }
    uint32_t n_blocks() const { return blocks.size(); }
    uint32_t n_held() const;  // blocks that hold a position
    size_t   block_bytes() const { return n_bytes; }
    uint64_t rows_of_token() const { return n_rows; }
    uint64_t n_archived() const;  // rows
    uint64_t bytes_in_memory() const { return n_in_memory * n_bytes; }
    uint64_t bytes_in_file() const { return n_slots * n_bytes; }

    uint64_t n_lost = 0;  // rows

  private:
    struct block {
        uint64_t                   held = 0;  // a bit for each position
        std::unique_ptr<uint8_t[]> data;
        int64_t                    slot = -1;  // in the file
        std::vector<uint64_t>      sums;       // of each part in the file
    };

    laq_archive_shape   shape;
    std::vector<size_t> offsets;  // of each part in a block, and the end
    size_t              n_bytes;
    uint64_t            n_rows = 0;
    uint64_t            limit;
    uint64_t            n_in_memory = 0;  // blocks
    std::vector<block>  blocks;           // by position / N_BLOCK

    std::string                              folder;
    std::string                              path;
    std::FILE *                              file    = nullptr;
    uint64_t                                 n_slots = 0;
    std::vector<int64_t>                     free_slots;
    std::function<void(const std::string &)> warn;

    void swap(laq_archive & other);
    void allocate(block & b, bool zero);
    bool load(block & b);
    bool store(block & b);
    void shrink();
    void drop(block & b);
    void lose(block & b, const std::string & why);
    void open_file();
    void close_file();
    bool seek(const block & b, size_t offset);
};
