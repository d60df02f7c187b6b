// What a sequence leaves behind for its next token.
//
// Each layer has a state of one kind. "full": keys and values of all positions. Kinds to come: sliding-window ring, MLA
// latent, recurrent matrix, convolution tail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/kernels.h"

namespace edgemoe {

// Keys and values of one layer for a whole context, in blocks of kKvBlock positions, [block][kv head][keys | values].
struct KvShape {
    int kv_heads;
    int head_dim;
    KvType key_type;
    KvType value_type;

    size_t key_bytes() const { return kv_block_bytes(key_type, head_dim); }
    size_t head_bytes() const { return key_bytes() + kv_block_bytes(value_type, head_dim); }
    size_t block_bytes() const { return head_bytes() * static_cast<size_t>(kv_heads); }
};

class SequenceState {
  public:
    // Room for `context` positions in every layer; memory is charged as positions are written.
    SequenceState(std::vector<KvShape> layers, int context);

    static size_t bytes(std::span<const KvShape> layers, int context);

    int length() const { return length_; }
    void set_length(int length) { length_ = length; }

    std::byte* keys(int layer, int block, int kv_head);
    std::byte* values(int layer, int block, int kv_head) {
        return keys(layer, block, kv_head) + shapes_[layer].key_bytes();
    }

    // Forgets all positions from `length` on. Full attention can always do this; kinds that cannot will throw.
    void truncate(int length);

    // All of the state up to length(), as one piece of memory that restore() takes back. Layout is private.
    size_t snapshot_bytes() const;
    void snapshot(std::span<std::byte> target) const;
    // Throws std::invalid_argument where `source` is not a snapshot of a state of this shape.
    void restore(std::span<const std::byte> source);

  private:
    size_t used_bytes(int layer, int length) const;

    std::vector<KvShape> shapes_;
    std::vector<size_t> begins_;  // [layers] into the arena
    int context_;
    int length_ = 0;
    Arena arena_;
};

}  // namespace edgemoe
