// The states of sequences: who holds which block, and that what a sequence sees is what was written for it.
#include "edgemoe/sequence_state.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>

#include "check.h"

namespace edgemoe::tests {
namespace {

constexpr int kContext = 640, kChunk = 32, kWindow = 40;
constexpr int kWindowBlocks = 3;  // the window and a chunk, anywhere: (40 + 32 - 2) / 64 + 2

// Two layers of all positions, two with a window.
std::vector<KvShape> shapes() {
    const KvShape full{1, 2, KvType::f32, KvType::f32, 0}, window{2, 1, KvType::f32, KvType::f32, kWindow};
    return {full, window, window, full};
}

size_t free_blocks(const StatePool& pool, int group) { return pool.groups()[group].free.size(); }

// Numbers that stand for keys and values of a sequence's positions, in a state and beside it.
struct Sequence {
    explicit Sequence(StatePool& pool) : pool(pool), state(std::make_unique<SequenceState>(pool)) {}

    float number(int layer, int head, int position) const {
        return static_cast<float>(numbers[position] * 16 + layer * 4 + head * 2);
    }

    void store(int begin, int end) const {
        const Kernels& kernels = select_kernels("scalar");
        for (int layer = 0; layer < static_cast<int>(pool.layers().size()); ++layer) {
            const KvShape& shape = pool.layers()[layer];
            for (int head = 0; head < shape.kv_heads; ++head)
                for (int position = begin; position < end; ++position) {
                    const std::vector<float> key(shape.head_dim, number(layer, head, position)),
                        value(shape.head_dim, number(layer, head, position) + 1);
                    kernels.store_key(KvType::f32, key, position, state->blocks(layer, head));
                    kernels.store_value(KvType::f32, value, position, state->blocks(layer, head));
                }
        }
    }

    void write(int count, int first_number, bool finish = true) {
        const int begin = state->length(), end = begin + count;
        numbers.resize(begin);
        for (int position = begin; position < end; ++position) {
            state->begin_writing(position + 1);
            numbers.push_back(first_number + position - begin);
        }
        store(begin, end);
        if (finish) {
            state->set_length(end);
        } else {
            state->give_up_writing();
            numbers.resize(begin);
        }
    }

    void write_to(int length, int first_number) {
        while (state->length() < length)
            write(std::min(kChunk, length - state->length()), first_number + state->length());
    }

    // What the next token sees.
    void check_content(const std::string& what) const {
        for (int layer = 0; layer < static_cast<int>(pool.layers().size()); ++layer) {
            const KvShape& shape = pool.layers()[layer];
            const int length = state->length(), first = shape.window ? std::max(length - shape.window + 1, 0) : 0;
            for (int head = 0; head < shape.kv_heads; ++head) {
                const KvBlocks blocks = state->blocks(layer, head);
                for (int position = first; position < length; ++position) {
                    const int32_t block = blocks.table[position / kKvBlock];
                    check(block >= 0, what + ": position " + std::to_string(position) + " has no block");
                    const auto* keys = reinterpret_cast<const float*>(blocks.pool + blocks.stride * block);
                    const auto* values =
                        reinterpret_cast<const float*>(blocks.pool + blocks.stride * block + blocks.values);
                    const int place = position % kKvBlock, dim = shape.head_dim;
                    check(keys[(dim - 1) * kKvBlock + place] == number(layer, head, position) &&
                              values[place * dim + dim - 1] == number(layer, head, position) + 1,
                          what + ": position " + std::to_string(position) + " of layer " + std::to_string(layer) +
                              " is not what was written");
                }
            }
        }
    }

    StatePool& pool;
    std::unique_ptr<SequenceState> state;
    std::vector<int> numbers;  // [length]
};

void test_blocks_are_used_again() {
    StatePool pool(shapes(), 2, kContext, kChunk);
    check(pool.groups().size() == 2, "layers with one window do not share their blocks' numbers");
    const size_t full = free_blocks(pool, 0), window = free_blocks(pool, 1);
    check(full == 20 && window == 2 * kWindowBlocks, "the pool has another number of blocks");

    Sequence sequence(pool);
    check(free_blocks(pool, 0) == full, "an empty sequence holds blocks");
    sequence.write_to(300, 1000);
    check(free_blocks(pool, 0) == full - 5, "300 positions do not take 5 blocks");
    check(free_blocks(pool, 1) == window - kWindowBlocks, "a window does not keep what it should");
    check(sequence.state->blocks(1, 0).table[0] < 0 && sequence.state->blocks(1, 0).table[2] >= 0,
          "a window keeps other blocks than its last ones");
    const int32_t third = sequence.state->blocks(0, 0).table[3], fourth = sequence.state->blocks(3, 0).table[4];

    // The ring has overwritten the blocks before the third: 128 - 1 + 40 positions are the least it can go back to.
    check_throws<StateError>([&] { sequence.state->truncate(166); }, "going back behind a window");
    check(sequence.state->length() == 300, "a refused truncation changed the length");
    sequence.check_content("after a refusal");
    sequence.state->truncate(167);
    check(free_blocks(pool, 0) == full - 3 && free_blocks(pool, 1) == window - 1, "truncating gives no blocks back");
    sequence.check_content("after truncating");
    sequence.write_to(300, 2000);
    sequence.check_content("after writing again");
    check(sequence.state->blocks(0, 0).table[3] == third && sequence.state->blocks(3, 0).table[4] == fourth,
          "blocks that were given back are not the next to be taken");
    check_throws<StateError>([&] { sequence.state->truncate(166); }, "going back behind a window, again,");

    // A chunk that is not finished.
    sequence.write(30, 5000, false);
    check(sequence.state->length() == 300 && free_blocks(pool, 0) == full - 5, "an unfinished chunk holds blocks");
    sequence.check_content("after an unfinished chunk");
    sequence.write(30, 6000);
    sequence.check_content("after the chunk was done again");

    sequence.state->truncate(0);
    check(free_blocks(pool, 0) == full && free_blocks(pool, 1) == window, "an empty sequence keeps blocks");
    sequence.write_to(kContext, 0);
    sequence.check_content("a full context");
    sequence.state.reset();
    check(free_blocks(pool, 0) == full && free_blocks(pool, 1) == window, "a sequence that ended keeps blocks");
}

// Sequences come, grow, fail, go back, are put aside and taken up again, and go, in any order: each sees its own.
void test_many_sequences() {
    constexpr int kSequences = 3;
    StatePool pool(shapes(), kSequences, kContext, kChunk);
    const size_t full = free_blocks(pool, 0), window = free_blocks(pool, 1);
    Random random(9);
    std::array<std::optional<Sequence>, kSequences> sequences;
    std::optional<std::pair<std::vector<std::byte>, std::vector<int>>> saved;
    int next = 0, refused = 0, gone_back = 0;
    for (int round = 0; round < 4000; ++round) {
        auto& sequence = sequences[random() % kSequences];
        if (!sequence) {
            sequence.emplace(pool);
            continue;
        }
        SequenceState& state = *sequence->state;
        const int length = state.length(), action = pick(random, 0, 99);
        if (action < 70) {
            const int count = std::min(pick(random, 1, kChunk), kContext - length);
            sequence->write(count, next, action >= 5);
            next += count;
        } else if (action < 90) {
            const int target =
                length - std::min(length, pick(random, 0, 1) ? pick(random, 0, 40) : pick(random, 0, 300));
            try {
                state.truncate(target);
                sequence->numbers.resize(target);
                ++gone_back;
            } catch (const StateError&) {
                ++refused;
            }
        } else if (action < 93) {
            state.truncate(0);
            sequence->numbers.clear();
        } else if (action < 95) {
            saved.emplace(std::vector<std::byte>(state.snapshot_bytes()), sequence->numbers);
            state.snapshot(saved->first);
        } else if (action < 98) {
            if (!saved) continue;
            state.restore(saved->first);
            sequence->numbers = saved->second;
            std::vector<std::byte> again(state.snapshot_bytes());
            state.snapshot(again);
            check(again == saved->first, "a restored state has another snapshot");
        } else {
            sequence.reset();
        }
        for (const auto& each : sequences)
            if (each) {
                check(each->state->length() == static_cast<int>(each->numbers.size()),
                      "a length that nobody asked for");
                each->check_content("round " + std::to_string(round));
            }
    }
    check(refused > 20 && gone_back > 200, "the rounds do not do what they are there for");
    for (auto& sequence : sequences) sequence.reset();
    check(free_blocks(pool, 0) == full && free_blocks(pool, 1) == window, "blocks are lost");
    for (const StatePool::Group& group : pool.groups()) {
        std::vector<int32_t> blocks = group.free;
        std::ranges::sort(blocks);
        for (size_t i = 0; i < blocks.size(); ++i) check(blocks[i] == static_cast<int32_t>(i), "a block is free twice");
    }
}

void test_room_for_sequences() {
    std::vector<KvShape> layers = shapes();
    layers.push_back({0, 0, KvType::f16, KvType::f16, 0, false, 30, 7});
    check(StatePool::bytes(layers, 3, kContext, kChunk) == 3 * StatePool::bytes(layers, 1, kContext, kChunk),
          "three sequences do not need the memory of three");
    StatePool pool(layers, 2, kContext, kChunk);
    SequenceState first(pool);
    auto second = std::make_unique<SequenceState>(pool);
    try {
        SequenceState third(pool);
        check(false, "a third of two sequences was made");
    } catch (const StateError& error) {
        check(std::string(error.what()).find("room for 2 sequences") != std::string::npos,
              std::string("the refusal does not say how many there may be: ") + error.what());
    }
    // Recurrences are apart, and so are their copies.
    const auto fill = [](SequenceState& state, float value) {
        std::fill_n(state.recurrence(4), 30, value);
        std::fill_n(state.convolution(4), 7, value + 1);
    };
    const auto holds = [](SequenceState& state, float value) {
        return std::all_of(state.recurrence(4), state.recurrence(4) + 30, [&](float x) { return x == value; }) &&
               std::all_of(state.convolution(4), state.convolution(4) + 7, [&](float x) { return x == value + 1; });
    };
    for (const auto& [state, value] : {std::pair{&first, 1.0f}, std::pair{second.get(), 2.0f}}) {
        state->begin_writing(5);
        fill(*state, value);
        state->set_length(5);
        state->mark();
    }
    first.begin_writing(7);
    fill(first, 3);
    first.give_up_writing();
    check(holds(first, 1) && first.length() == 5 && holds(*second, 2) && second->length() == 5,
          "a failure of one sequence reached another, or did not go back to the mark");
    fill(*second, 4);
    check_throws<StateError>([&] { second->truncate(4); }, "a recurrence that goes back beside its mark");
    check(holds(*second, 4) && holds(first, 1), "a refusal changed a recurrence");
    second.reset();
    SequenceState again(pool);
    check(again.length() == 0 && again.marked() == 0, "a new sequence begins with what another one left");
    check_throws<std::invalid_argument>([&] { StatePool::bytes(layers, 1 << 30, kContext, kChunk); },
                                        "more blocks than can be counted");
}

// What lies behind the last position in a block may have been another sequence's: it is in no snapshot.
void test_snapshots_say_nothing_of_others() {
    for (const KvType type : {KvType::f32, KvType::f16, KvType::q8_0}) {
        const std::vector<KvShape> layers{{2, 32, type, type, 0}, {1, 32, type, type, 0, true}};
        const auto snapshot = [&](bool after_another) {
            StatePool pool(layers, 1, 128, kChunk);
            const Kernels& kernels = select_kernels("scalar");
            std::vector<std::byte> bytes;
            for (const float value : {9.0f, 5.0f}) {
                if (value == 9.0f && !after_another) continue;
                SequenceState state(pool);
                const int length = value == 9.0f ? 128 : 70;
                state.begin_writing(length);
                const std::vector<float> vector(32, value);
                for (int layer = 0; layer < 2; ++layer)
                    for (int head = 0; head < layers[layer].kv_heads; ++head)
                        for (int position = 0; position < length; ++position) {
                            kernels.store_key(type, vector, position, state.blocks(layer, head));
                            if (layer == 0) kernels.store_value(type, vector, position, state.blocks(layer, head));
                        }
                state.set_length(length);
                bytes.resize(state.snapshot_bytes());
                state.snapshot(bytes);
            }
            return bytes;
        };
        check(snapshot(false) == snapshot(true), "a snapshot holds what another sequence left");
    }
}

}  // namespace

void test_sequence_state() {
    test_blocks_are_used_again();
    test_many_sequences();
    test_room_for_sequences();
    test_snapshots_say_nothing_of_others();
}

}  // namespace edgemoe::tests
