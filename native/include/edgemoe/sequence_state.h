// What a sequence leaves behind for its next token.
//
// Each layer has a state of one kind. "full": keys and values of all positions. "window": those of the last positions
// only, in a ring of blocks. "latent": one vector per position that is key and value of all heads. "recurrence" and
// "convolution": the matrices that all positions have been added to, and the inputs of the last positions; these do not
// grow, and cannot go back except to a copy of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/kernels.h"

namespace edgemoe {

// Keys and values of one layer, in blocks of kKvBlock positions that begin at absolute multiples of it,
// [block][kv head][keys | values].
struct KvShape {
    int kv_heads;
    int head_dim;
    KvType key_type;
    KvType value_type;
    int window;              // positions that a token sees, itself included; 0 for all
    bool latent = false;     // there are no values but the keys
    size_t recurrence = 0;   // floats of it
    size_t convolution = 0;  // floats of it

    size_t key_bytes() const { return kv_block_bytes(key_type, head_dim); }
    size_t head_bytes() const { return key_bytes() + (latent ? 0 : kv_block_bytes(value_type, head_dim)); }
    size_t constant_bytes() const { return (recurrence + convolution) * sizeof(float); }
    size_t block_bytes() const { return head_bytes() * static_cast<size_t>(kv_heads); }

    // Blocks that are kept: of a window, what the first token of a chunk sees and the whole chunk, since the keys of a
    // chunk are stored before its first token attends.
    int kept_blocks(int context, int chunk) const;
    // The first block that holds a position which the token at `position` or a later one sees.
    int first_block(int position) const {
        return window && position >= window ? (position - window + 1) / kKvBlock : 0;
    }
};

// Positions that are asked for are not kept any more.
struct StateError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class SequenceState {
  public:
    // Room for `context` positions in every layer, written in chunks of at most `chunk`; memory is charged as positions
    // are written.
    SequenceState(std::vector<KvShape> layers, int context, int chunk);

    static size_t bytes(std::span<const KvShape> layers, int context, int chunk);

    int length() const { return length_; }
    void set_length(int length) {
        length_ = length;
        writing_ = false;
    }
    // Before positions up to `end` are written: what they overwrite is lost, whether or not the chunk is finished.
    void begin_writing(int end);
    // A chunk that was begun will not be finished. A state with a recurrence goes back to its mark, or to its
    // beginning.
    void give_up_writing();

    // Keeps a copy of what truncate() could not get back otherwise, in place of the last one. Nothing to do, and free,
    // where there is neither a recurrence nor a convolution.
    void mark();
    // The length that mark() was called at; 0 if there is no copy.
    int marked() const { return marked_; }
    bool has_constants() const { return constant_bytes_ > 0; }

    float* recurrence(int layer) { return constants(layer); }
    float* convolution(int layer) { return constants(layer) + shapes_[layer].recurrence; }

    std::byte* keys(int layer, int block, int kv_head);
    std::byte* values(int layer, int block, int kv_head) {
        return keys(layer, block, kv_head) + shapes_[layer].key_bytes();
    }

    // Forgets all positions from `length` on. Throws StateError, and changes nothing, where a layer does not keep what
    // the next token would see; length 0 is always possible, and with a recurrence only that and marked().
    void truncate(int length);

    // What the state up to length() needs to go on, as one piece of memory that restore() takes back. Layout is
    // private. A restored state cannot be truncated within its windows.
    size_t snapshot_bytes() const;
    void snapshot(std::span<std::byte> target) const;
    // Throws std::invalid_argument where `source` is not a snapshot of a state of this shape.
    void restore(std::span<const std::byte> source);

  private:
    void go_back(int length);
    size_t used_bytes(int layer, int length) const;
    std::byte* block(int layer, int number);
    float* constants(int layer);

    std::vector<KvShape> shapes_;
    std::vector<int> kept_;       // [layers] blocks
    std::vector<size_t> begins_;  // [layers] into the arena
    int context_;
    int length_ = 0;
    int written_ = 0;   // end of the positions ever written since the state was empty
    int restored_ = 0;  // length of the last restored snapshot
    int marked_ = 0;
    bool writing_ = false;
    size_t constant_bytes_ = 0;  // of all layers; the copy lies at the end of the arena
    Arena arena_;
};

}  // namespace edgemoe
