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

// The same, with a recurrence and convolutions between them.
std::vector<KvShape> shapes_with_constants() {
    std::vector<KvShape> layers = shapes();
    layers.insert(layers.begin() + 2, {0, 0, KvType::f32, KvType::f32, 0, false, 30, 7});
    layers.push_back({0, 0, KvType::f32, KvType::f32, 0, false, 0, 5});
    return layers;
}

// For so many sequences, each of kContext positions.
StateRoom room_for(int sequences) {
    return {.sequences = sequences, .context = kContext, .positions = sequences * kContext, .chunk = kChunk};
}

size_t free_blocks(const StatePool& pool, int group) { return pool.groups()[group].free.size(); }

void check_all_free(const StatePool& pool) {
    for (const StatePool::Group& group : pool.groups()) {
        std::vector<int32_t> blocks = group.free;
        std::ranges::sort(blocks);
        check(static_cast<int>(blocks.size()) == group.blocks, "blocks are lost");
        for (int i = 0; i < group.blocks; ++i) check(blocks[i] == i, "a block is free twice");
        check(std::ranges::count(group.references, 0) == group.blocks, "a free block has references");
    }
}

// Numbers that stand for keys, values and constants of a sequence's positions, in a state and beside it.
struct Sequence {
    explicit Sequence(StatePool& pool) : pool(pool), state(std::make_unique<SequenceState>(pool)) {}
    Sequence(const Sequence& other, int length)
        : pool(other.pool), state(std::make_unique<SequenceState>(*other.state, length)), numbers(other.numbers) {
        numbers.resize(length);
    }

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

    // All constants of a layer after the last position.
    std::span<float> constants(int layer) const {
        const KvShape& shape = pool.layers()[layer];
        return {state->recurrence(layer), shape.recurrence + shape.convolution};
    }

    // Before its positions are stored, and room was made for them.
    void begin(int count, int first_number) {
        const int begin = state->length();
        numbers.resize(begin + count);
        std::iota(numbers.begin() + begin, numbers.end(), first_number);
    }

    void end(bool finish) {
        const int begin = state->length(), end = static_cast<int>(numbers.size());
        store(begin, end);
        for (int layer = 0; layer < static_cast<int>(pool.layers().size()); ++layer) {
            const float* before = state->recurrence_before(layer);
            const std::span<float> now = constants(layer);
            if (before && begin > 0)
                check(std::all_of(before, before + now.size(), [&](float x) { return x == numbers[begin - 1]; }),
                      "a pass begins with other constants than the last one has left");
            std::ranges::fill(now, static_cast<float>(numbers.back()));
        }
        if (finish) {
            state->set_length(end);
        } else {
            state->give_up_writing();
            numbers.resize(state->length());
        }
    }

    void write(int count, int first_number, bool finish = true) {
        const StatePool::Writing writing{state.get(), state->length() + count};
        pool.begin_writing({&writing, 1});
        begin(count, first_number);
        end(finish);
    }

    void write_to(int length, int first_number) {
        while (state->length() < length)
            write(std::min(kChunk, length - state->length()), first_number + state->length());
    }

    // What the next token sees.
    void check_content(const std::string& what) const {
        check(state->length() == static_cast<int>(numbers.size()), what + ": a length that nobody asked for");
        for (int layer = 0; layer < static_cast<int>(pool.layers().size()); ++layer) {
            const KvShape& shape = pool.layers()[layer];
            const int length = state->length(), first = shape.window ? std::max(length - shape.window + 1, 0) : 0;
            const auto fail = [&](int position, const char* how) {
                throw std::runtime_error(what + ": position " + std::to_string(position) + " of layer " +
                                         std::to_string(layer) + how);
            };
            for (const float x : constants(layer))
                if (length > 0 && x != numbers.back()) fail(length - 1, " has other constants");
            for (int head = 0; head < shape.kv_heads; ++head) {
                const KvBlocks blocks = state->blocks(layer, head);
                for (int position = first; position < length; ++position) {
                    const int32_t block = blocks.table[position / kKvBlock];
                    if (block < 0) fail(position, " has no block");
                    const auto* keys = reinterpret_cast<const float*>(blocks.pool + blocks.stride * block);
                    const auto* values =
                        reinterpret_cast<const float*>(blocks.pool + blocks.stride * block + blocks.values);
                    const int place = position % kKvBlock, dim = shape.head_dim;
                    if (keys[(dim - 1) * kKvBlock + place] != number(layer, head, position) ||
                        values[place * dim + dim - 1] != number(layer, head, position) + 1)
                        fail(position, " is not what was written");
                }
            }
        }
    }

    StatePool& pool;
    std::unique_ptr<SequenceState> state;
    std::vector<int> numbers;  // [length]
};

void test_blocks_are_used_again() {
    StatePool pool(shapes(), room_for(2));
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
    sequence.numbers.resize(167);
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
    sequence.numbers.clear();
    check(free_blocks(pool, 0) == full && free_blocks(pool, 1) == window, "an empty sequence keeps blocks");
    sequence.write_to(kContext, 0);
    sequence.check_content("a full context");
    sequence.state.reset();
    check(free_blocks(pool, 0) == full && free_blocks(pool, 1) == window, "a sequence that ended keeps blocks");
}

// What is not shared is what would be free without a sequence.
int64_t unshared(const Sequence& sequence) {
    const std::span<const StatePool::Group> groups = sequence.pool.groups();
    const KvBlocks blocks = sequence.state->blocks(0, 0);
    int count = 0;
    for (int number = 0; number < kContext / kKvBlock; ++number)
        count += blocks.table[number] >= 0 && groups[0].references[blocks.table[number]] == 1;
    return int64_t{count} * kKvBlock;
}

// Sequences come, grow alone and together, fail, fork, go back, are put aside and taken up again, and go, in any order
// and with too little room for all: each sees its own.
void test_many_sequences(std::vector<KvShape> layers, int positions) {
    constexpr int kSequences = 5;
    StateRoom room = room_for(kSequences);
    room.positions = positions;
    StatePool pool(std::move(layers), room);
    Random random(9);
    std::array<std::optional<Sequence>, kSequences> sequences;
    std::optional<std::pair<std::vector<std::byte>, std::vector<int>>> saved;
    int next = 0, refused = 0, gone_back = 0, full = 0, forks = 0, no_forks = 0, copies = 0;
    // A pass of some of the sequences at once.
    const auto pass = [&](std::span<const std::pair<int, int>> rows, bool finish) {
        std::vector<StatePool::Writing> writings;
        for (const auto& [place, count] : rows)
            writings.push_back({sequences[place]->state.get(), sequences[place]->state->length() + count});
        const auto free = [&] {
            std::vector<std::vector<int32_t>> all;
            for (const StatePool::Group& group : pool.groups()) {
                all.push_back(group.free);
                all.push_back(group.references);
            }
            return all;
        };
        const auto before = free();
        try {
            pool.begin_writing(writings);
        } catch (const StateError&) {
            check(free() == before, "a pass without room took blocks");
            ++full;
            return;
        }
        for (const auto& [place, count] : rows) {
            sequences[place]->begin(count, next);
            next += count;
        }
        for (const auto& [place, count] : rows) sequences[place]->end(finish);
    };
    for (int round = 0; round < 2000; ++round) {
        const int place = pick(random, 0, kSequences - 1);
        auto& sequence = sequences[place];
        if (!sequence) {
            sequence.emplace(pool);
            continue;
        }
        SequenceState& state = *sequence->state;
        const int length = state.length(), action = pick(random, 0, 99);
        if (action < 60) {
            std::vector<std::pair<int, int>> rows;
            int left = kChunk;
            for (int other = 0; other < kSequences; ++other) {
                const bool takes_part = other == place || (sequences[other] && pick(random, 0, 2) == 0);
                if (!takes_part) continue;
                const int most = std::min(left, kContext - sequences[other]->state->length());
                const int count = most > 0 ? pick(random, 1, most) : 0;
                left -= count;
                if (count > 0) rows.emplace_back(other, count);
            }
            pass(rows, action >= 5);
        } else if (action < 78) {
            const int target =
                state.has_constants() && pick(random, 0, 1)
                    ? state.marked()
                    : length - std::min(length, pick(random, 0, 1) ? pick(random, 0, 40) : pick(random, 0, 300));
            try {
                state.truncate(target);
                sequence->numbers.resize(target);
                ++gone_back;
            } catch (const StateError&) {
                ++refused;
            }
        } else if (action < 82) {
            state.truncate(0);
            sequence->numbers.clear();
        } else if (action < 84) {
            saved.emplace(std::vector<std::byte>(state.snapshot_bytes()), sequence->numbers);
            state.snapshot(saved->first);
        } else if (action < 86) {
            if (!saved) continue;
            try {
                state.restore(saved->first);
                sequence->numbers = saved->second;
                std::vector<std::byte> again(state.snapshot_bytes());
                state.snapshot(again);
                check(again == saved->first, "a restored state has another snapshot");
            } catch (const StateError&) {
                check(state.length() == 0 && state.held_positions() == 0, "a state without room was restored in part");
                sequence->numbers.clear();
                ++full;
            }
        } else if (action < 89) {
            state.mark();
        } else if (action < 97) {
            const int target = (place + pick(random, 1, kSequences - 1)) % kSequences;
            if (pick(random, 0, 2)) sequences[target].reset();
            const int at = pick(random, 0, 2) ? length : pick(random, 0, 1) ? state.marked() : pick(random, 0, length);
            const int64_t free = pool.free_positions();
            try {
                Sequence fork(*sequence, at);
                check(pool.free_positions() == free, "a fork takes blocks before anything is written");
                if (sequences[target]) continue;
                fork.check_content("a fork");
                sequences[target].emplace(std::move(fork));
                ++forks;
                copies += at % kKvBlock != 0;
            } catch (const StateError&) {
                ++no_forks;
            }
        } else {
            sequence.reset();
        }
        for (const auto& each : sequences)
            if (each) {
                each->check_content("round " + std::to_string(round));
                check(each->state->held_positions() == unshared(*each), "a sequence holds other positions");
            }
    }
    for (const int times : {refused, gone_back / 10, forks / 3, no_forks, copies})
        check(times > 5, "the rounds do not do what they are there for: " + std::to_string(times));
    check((full > 0) == (positions < kSequences * kContext), "the pool was full " + std::to_string(full) + " times");
    for (auto& sequence : sequences) sequence.reset();
    check_all_free(pool);
}

// However positions are divided among sequences, there is room for as many as were asked for, and not for many more.
void test_room_for_positions() {
    Random random(3);
    for (const int sequences : {1, 2, 7, 16}) {
        const StateRoom room{.sequences = sequences, .context = kContext, .positions = 700, .chunk = kChunk};
        for (int round = 0; round < 50; ++round) {
            StatePool pool(shapes(), room);
            check(pool.free_positions() >= std::min(700, sequences * kContext) &&
                      pool.free_positions() <= 700 + 64 * sequences,
                  "a pool has room for another number of positions");
            std::vector<Sequence> all;
            for (int i = 0; i < sequences; ++i) all.emplace_back(pool);
            for (int left = 700, fails = 0; left > 0 && fails < 200;) {
                Sequence& sequence = all[pick(random, 0, sequences - 1)];
                const int count = std::min({pick(random, 1, kChunk), left, kContext - sequence.state->length()});
                if (count <= 0) {
                    ++fails;
                    continue;
                }
                sequence.write(count, 0);
                left -= count;
            }
            for (const Sequence& sequence : all) sequence.check_content("one of all positions");
        }
    }
    StateRoom one = room_for(1);
    one.positions = 0;
    check(StatePool::bytes(shapes(), one) == StatePool::bytes(shapes(), room_for(1)), "0 is not what one may have");
    check(StatePool::bytes(shapes(), room_for(4)) == 4 * StatePool::bytes(shapes(), one),
          "four sequences of the whole context do not need the memory of four");
    StateRoom shared = room_for(4);
    shared.positions = kContext;
    // Layers of all positions: 3 blocks more than one sequence has, for the ends of the others.
    const KvShape full = shapes()[0];
    check(StatePool::bytes({&full, 1}, shared) == StatePool::bytes({&full, 1}, one) + 3 * full.block_bytes(),
          "a pool of shared positions has another size");
    one.positions = kContext - 1;
    check_throws<std::invalid_argument>([&] { StatePool::bytes(shapes(), one); }, "less room than one may have");
}

// Sequences that write into the block they share take a copy each, but for the last one.
void test_copies_on_writing() {
    StateRoom room{.sequences = 4, .context = 256, .positions = 256, .chunk = kChunk};
    StatePool pool({shapes()[0]}, room);
    Sequence first(pool);
    first.write_to(70, 100);
    std::vector<Sequence> all;
    for (int i = 0; i < 3; ++i) all.emplace_back(first, 70);
    check(free_blocks(pool, 0) == 5 && first.state->held_positions() == 0, "forks do not share their blocks");
    check(all[0].state->blocks(0, 0).table[1] == first.state->blocks(0, 0).table[1], "a fork has blocks of its own");
    std::vector<StatePool::Writing> writings{{first.state.get(), 71}};
    for (const Sequence& fork : all) writings.push_back({fork.state.get(), 71});
    pool.begin_writing(writings);
    check(free_blocks(pool, 0) == 2, "four writers of a block do not take three more");
    first.begin(1, 1);
    first.end(true);
    for (int i = 0; i < 3; ++i) {
        all[i].begin(1, 10 * i);
        all[i].end(i > 0);
    }
    for (const Sequence& fork : all) fork.check_content("a fork that wrote");
    first.check_content("what was forked");
    check(all[0].state->blocks(0, 0).table[0] == first.state->blocks(0, 0).table[0], "a whole block was copied");
    check(all[1].state->held_positions() == 64, "a block that is shared counts as one's own");
    all.clear();
    check(first.state->held_positions() == 128, "blocks stay shared with nobody");

    // A block too few: nothing is taken, and everything goes on once there is room.
    for (int i = 0; i < 3; ++i) all.emplace_back(first, 71);
    Sequence& other = all.back();
    other.write_to(256, 0);
    check(free_blocks(pool, 0) == 2, "256 positions with 64 shared ones take another number of blocks");
    all[0].write(70, 0);
    check(free_blocks(pool, 0) == 0, "two more blocks are not what was left");
    check_throws<StateError>([&] { first.write(1, 0); }, "a copy without a free block");
    check_throws<StateError>([&] { all[1].write(1, 0); }, "a copy without a free block");
    first.numbers.resize(71);
    all[1].numbers.resize(71);
    for (const Sequence& each : all) each.check_content("after a refusal");
    first.check_content("after a refusal");
    all[1].state->truncate(0);
    all[1].numbers.clear();
    first.write(1, 0);  // nobody else has the block now
    first.check_content("the last one that has a block");
}

void test_room_for_sequences() {
    std::vector<KvShape> layers = shapes();
    layers.push_back({0, 0, KvType::f16, KvType::f16, 0, false, 30, 7});
    StatePool pool(layers, room_for(2));
    auto first_state = std::make_unique<SequenceState>(pool);
    SequenceState& first = *first_state;
    auto second = std::make_unique<SequenceState>(pool);
    const auto refusal = [&](const auto& make) {
        try {
            make();
            check(false, "a third of two sequences was made");
        } catch (const StateError& error) {
            check(std::string(error.what()).find("room for 2 sequences") != std::string::npos,
                  std::string("the refusal does not say how many there may be: ") + error.what());
        }
    };
    refusal([&] { SequenceState third(pool); });
    refusal([&] { SequenceState third(first, 0); });
    // Recurrences are apart, and so are their copies.
    const auto fill = [](SequenceState& state, float value) {
        std::fill_n(state.recurrence(4), 30, value);
        std::fill_n(state.convolution(4), 7, value + 1);
    };
    const auto holds = [](SequenceState& state, float value) {
        return std::all_of(state.recurrence(4), state.recurrence(4) + 30, [&](float x) { return x == value; }) &&
               std::all_of(state.convolution(4), state.convolution(4) + 7, [&](float x) { return x == value + 1; });
    };
    const auto begin = [&](SequenceState& state, int end) {
        const StatePool::Writing writing{&state, end};
        pool.begin_writing({&writing, 1});
    };
    for (const auto& [state, value] : {std::pair{&first, 1.0f}, std::pair{second.get(), 2.0f}}) {
        begin(*state, 5);
        fill(*state, value);
        state->set_length(5);
        state->mark();
    }
    begin(first, 7);
    fill(first, 3);
    first.give_up_writing();
    check(holds(first, 1) && first.length() == 5 && holds(*second, 2) && second->length() == 5,
          "a failure of one sequence reached another, or left something behind");
    begin(first, 7);
    fill(first, 5);
    first.set_length(7);
    begin(first, 9);
    fill(first, 6);
    first.give_up_writing();
    check(holds(first, 5) && first.length() == 7 && first.marked() == 5, "a failure went back behind the pass");
    fill(*second, 4);
    check_throws<StateError>([&] { second->truncate(4); }, "a recurrence that goes back beside its mark");
    check(holds(*second, 4) && holds(first, 5), "a refusal changed a recurrence");
    second.reset();
    check_throws<StateError>([&] { SequenceState fork(first, 6); }, "a fork beside mark and end");
    check_throws<std::invalid_argument>([&] { SequenceState fork(first, 8); }, "a fork behind the end");
    {
        SequenceState fork(first, 7);
        check(holds(fork, 5) && fork.length() == 7 && fork.marked() == 5, "a fork of the end is another one");
        fork.truncate(5);
        check(holds(fork, 1), "a fork's mark is not that of what was forked");
    }
    {
        SequenceState fork(first, 5);
        check(holds(fork, 1) && fork.length() == 5 && fork.marked() == 5, "a fork of the mark is another one");
        first_state.reset();
        check(holds(fork, 1), "a fork's constants go with what was forked");
    }
    SequenceState again(pool);
    check(again.length() == 0 && again.marked() == 0, "a new sequence begins with what another one left");
}

// With one sequence there is no copy but the mark: a pass that fails goes back to it.
void test_a_single_sequence_goes_back_to_its_mark() {
    StatePool pool(shapes_with_constants(), room_for(1));
    const size_t constants =
        StatePool::bytes(shapes_with_constants(), room_for(1)) - StatePool::bytes(shapes(), room_for(1));
    size_t one = 0;
    for (const KvShape& shape : shapes_with_constants()) one += shape.constant_bytes();
    check(constants == 2 * ((one + 63) / 64 * 64), "one sequence has another number of copies");
    Sequence sequence(pool);
    sequence.write(20, 100);
    sequence.state->mark();
    sequence.write(10, 200);
    sequence.write(10, 300, false);
    check(sequence.state->length() == 20, "a failure did not go back to the mark");
    sequence.check_content("back at the mark");
}

// What lies behind the last position in a block may have been another sequence's: it is in no snapshot.
void test_snapshots_say_nothing_of_others() {
    for (const KvType type : {KvType::f32, KvType::f16, KvType::q8_0}) {
        const std::vector<KvShape> layers{{2, 32, type, type, 0}, {1, 32, type, type, 0, true}};
        const auto snapshot = [&](bool after_another) {
            StatePool pool(layers, {.sequences = 1, .context = 128, .positions = 128, .chunk = kChunk});
            const Kernels& kernels = select_kernels("scalar");
            std::vector<std::byte> bytes;
            for (const float value : {9.0f, 5.0f}) {
                if (value == 9.0f && !after_another) continue;
                SequenceState state(pool);
                const int length = value == 9.0f ? 128 : 70;
                const StatePool::Writing writing{&state, length};
                pool.begin_writing({&writing, 1});
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
    for (const int positions : {5 * kContext, kContext + 100}) {
        test_many_sequences(shapes(), positions);
        test_many_sequences(shapes_with_constants(), positions);
    }
    test_room_for_positions();
    test_copies_on_writing();
    test_room_for_sequences();
    test_a_single_sequence_goes_back_to_its_mark();
    test_snapshots_say_nothing_of_others();
}

}  // namespace edgemoe::tests
