// Where sections and their tensors come to lie: what is read is what the file holds, and no index makes it lie
// elsewhere.
#include "store/placement.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>

#include "check.h"
#include "edgemoe/arena.h"
#include "edgemoe/crc32c.h"
#include "store/layout.h"

namespace edgemoe::tests {
namespace {

constexpr uint64_t kFileBytes = 64 * kDiskBlock;

struct File {
    std::vector<std::byte> content;
    std::unique_ptr<TemporaryFile> file;
    std::vector<std::unique_ptr<DirectFile>> files;

    File() : content(kFileBytes) {
        Random random(1);
        for (std::byte& byte : content) byte = static_cast<std::byte>(random());
        file = std::make_unique<TemporaryFile>(content);
        files.push_back(std::make_unique<DirectFile>(file->path()));
    }

    std::vector<std::byte> stored(const Section& section, const StoredTensor& tensor, size_t bytes) const {
        const auto begin =
            content.begin() + static_cast<ptrdiff_t>(section.extents[tensor.extent].offset + tensor.offset);
        return {begin, begin + static_cast<ptrdiff_t>(bytes)};
    }
};

// Sections of one to three extents anywhere in the file, with matrices alone or in company, of all kinds of layouts.
void test_places(const File& file) {
    Random random(2);
    for (int round = 0; round < 300; ++round) {
        const int extents = pick(random, 1, 3);
        const bool row_major = pick(random, 0, 1), in_company = extents == 1 && pick(random, 0, 1);
        const StoredLayout layout = stored_layout(row_major ? "ggml.q4_0" : "q4g64");
        Section section;
        std::vector<StoredTensor> tensors;
        for (int extent = 0; extent < extents; ++extent) {
            uint64_t bytes = 0;
            for (int i = 0; i < (in_company ? 3 : 1); ++i) {
                const int rows = pick(random, 1, 3) * kRowBlock + (row_major && !in_company ? pick(random, 0, 15) : 0);
                const int cols = pick(random, 1, 3) * kGroup;
                if (in_company || !row_major)
                    bytes = (bytes + 63) / 64 * 64;
                else
                    bytes += static_cast<uint64_t>(pick(random, 0, 100));
                tensors.push_back({static_cast<uint32_t>(extent), bytes, rows, cols, layout});
                bytes += stored_bytes(layout, rows, cols);
                if (in_company && i == 0) {
                    tensors.push_back({0, bytes = (bytes + 3) / 4 * 4, 1, 7, {}});
                    bytes += 7 * sizeof(float);
                }
            }
            const bool anywhere = row_major && !in_company;
            const uint64_t offset =
                static_cast<uint64_t>(pick(random, 0, 9000)) * (anywhere ? 1 : 64) % (8 * kDiskBlock);
            section.extents.push_back({0, offset, bytes + static_cast<uint64_t>(pick(random, 0, 500))});
        }
        uint32_t checksum = 0;
        for (const Extent& extent : section.extents)
            checksum = crc32c(std::span(file.content).subspan(extent.offset, extent.length), checksum);
        section.checksum = checksum;

        const Placement placement(section, tensors);
        placement.require_possible("the section");
        for (size_t i = 0; i < tensors.size(); ++i) placement.require_fitting(i, "a tensor");
        check(placement.bytes() % kDiskBlock == 0 && placement.read_bytes() <= placement.bytes(),
              "a section takes a part of a block");
        const Arena arena(placement.bytes());
        std::vector<std::byte> scratch(placement.interleaving_bytes());
        placement.read(file.files, arena.data());
        check(placement.is_intact(arena.data()), "a section that was read is not intact");
        placement.interleave(arena.data(), scratch.data());
        for (size_t i = 0; i < tensors.size(); ++i) {
            const StoredTensor& tensor = tensors[i];
            const std::byte* found = arena.data() + placement.place(i);
            const size_t bytes = tensor.layout ? stored_bytes(*tensor.layout, tensor.rows, tensor.cols)
                                               : static_cast<size_t>(tensor.cols) * sizeof(float);
            std::vector<std::byte> expected = file.stored(section, tensor, bytes);
            if (tensor.layout && row_major) {
                const std::vector<std::byte> rows = expected;
                expected.resize(matrix_bytes(layout.layout, tensor.rows, tensor.cols));
                interleave(layout.layout, tensor.rows, tensor.cols, rows.data(), expected.data(), scratch.data());
            }
            check(placement.place(i) + expected.size() <= placement.bytes(), "a tensor ends outside its memory");
            check(std::ranges::equal(expected, std::span(found, expected.size())), "a tensor lies elsewhere");
            check(placement.place(i) % (tensor.layout ? 64 : sizeof(float)) == 0, "a tensor is not aligned");
        }
        arena.data()[section.extents.back().offset % kDiskBlock] ^= std::byte{1};
        if (extents == 1 && !row_major)
            check(!placement.is_intact(arena.data()), "a damaged section is taken for intact");
    }
}

// What no index may say, of a dense tensor or of an expert's matrix: each alone is refused.
void test_impossible_places(const File& file) {
    constexpr uint64_t kMost = ~uint64_t{0};
    constexpr int kInt = std::numeric_limits<int>::max();
    const Section section{{{0, 128, 40000}, {0, 4096, 40000}}, {}};
    const std::vector<StoredTensor> tensors{{0, 64, 32, 64, stored_layout("q4g64")},
                                            {0, 8192, 32, 64, stored_layout("ggml.f32")},
                                            {0, 36000, 1, 100, {}},
                                            {1, 3, 33, 64, stored_layout("ggml.q8_0")}};
    const auto require = [](const Section& of, std::span<const StoredTensor> all) {
        const Placement placement(of, all);
        placement.require_possible("the section");
        for (size_t i = 0; i < all.size(); ++i) placement.require_fitting(i, "tensor " + std::to_string(i));
    };
    require(section, tensors);

    using Change = std::function<void(StoredTensor&)>;
    const auto refuse = [&](size_t number, const std::string& what, const Change& change) {
        std::vector<StoredTensor> changed = tensors;
        change(changed[number]);
        check_throws<std::invalid_argument>([&] { require(section, changed); },
                                            "tensor " + std::to_string(number) + ", " + what + ",");
    };
    for (size_t number = 0; number < tensors.size(); ++number) {
        const bool vector = !tensors[number].layout;
        for (const uint64_t offset : {uint64_t{40001}, kMost, kMost - 63, uint64_t{1} << 63, uint64_t{39936}})
            refuse(number, "offset " + std::to_string(offset), [&](auto& tensor) { tensor.offset = offset; });
        for (const uint32_t extent : {2u, 3u, ~0u})
            refuse(number, "extent " + std::to_string(extent), [&](auto& tensor) { tensor.extent = extent; });
        // Products of these overflow 64 bits, to zero or to something that would fit.
        for (const int size : {0, -1, -64, -kInt - 1, 1 << 20, 1 << 30, kInt / 64 * 64}) {
            refuse(number, "rows " + std::to_string(size),
                   [&](auto& tensor) { (vector ? tensor.cols : tensor.rows) = size; });
            refuse(number, "cols " + std::to_string(size), [&](auto& tensor) { tensor.cols = size; });
            refuse(number, "shape " + std::to_string(size), [&](auto& tensor) { tensor.rows = tensor.cols = size; });
        }
    }
    refuse(0, "unaligned", [](auto& tensor) { tensor.offset += 4; });
    refuse(1, "unaligned", [](auto& tensor) { tensor.offset += 4; });
    refuse(1, "in part of a row block", [](auto& tensor) { tensor.rows = 31; });
    refuse(2, "unaligned", [](auto& tensor) { tensor.offset += 2; });

    const auto refuse_extents = [&](const std::string& what, const std::vector<Extent>& extents) {
        check_throws<std::invalid_argument>([&] { require({extents, {}}, {}); }, what);
    };
    refuse_extents("no extents", {});
    refuse_extents("four extents", {{0, 0, 1}, {0, 0, 1}, {0, 0, 1}, {0, 0, 1}});
    refuse_extents("an empty extent", {{0, 0, 1}, {0, 0, 0}});
    for (const uint64_t length : {kMost, kMost - 127, uint64_t{1} << 63, uint64_t{1} << 39})
        refuse_extents("an extent of " + std::to_string(length), {{0, 128, length}});
    for (const uint64_t offset : {kMost, kMost - 4095, uint64_t{1} << 63})
        refuse_extents("an extent at " + std::to_string(offset), {{0, offset, 8192}});
    refuse_extents("extents of 2^38 and 1 bytes", {{0, 0, uint64_t{1} << 38}, {0, 0, 1}});

    const Section elsewhere{{{1, 0, 4096}}, {}};
    const Arena arena(kDiskBlock);
    check_throws<std::invalid_argument>([&] { Placement(elsewhere, {}).read(file.files, arena.data()); },
                                        "an extent in a file that there is not");
}

// The store's layout refuses the same of experts, before anything is divided by it.
void test_impossible_experts() {
    const StoredLayout stored = stored_layout("f32");
    PackIndex index;
    index.sections.push_back({{{0, 0, 3 * kDiskBlock}}, {}});
    ExpertLayer& layer = index.experts[3];
    layer.levels.push_back({32, {}});
    for (int part = 0; part < 3; ++part) layer.levels[0].parts[part] = {stored, 0, part * kDiskBlock, 16, 64};
    layer.sections.push_back({0});
    check(StoreLayout(index, false).unit() == 3 * kDiskBlock, "an expert takes other memory");
    const auto refuse = [&](const std::string& what, const std::function<void(PackIndex&)>& change) {
        PackIndex changed = index;
        change(changed);
        check_throws<std::invalid_argument>([&] { const StoreLayout refused(changed, false); }, what);
    };
    refuse("an expert without levels", [](PackIndex& i) { i.experts[3].sections[0].clear(); });
    refuse("an expert with a level more", [](PackIndex& i) { i.experts[3].sections[0].push_back(0); });
    refuse("nine levels", [](PackIndex& i) {
        i.experts[3].levels.assign(kMaxLevels + 1, i.experts[3].levels[0]);
        i.experts[3].sections[0].assign(kMaxLevels + 1, 0);
    });
    refuse("no levels", [](PackIndex& i) { i.experts[3].levels.clear(); });
    refuse("two levels that are not nested",
           [](PackIndex& i) { i.experts[3].levels.push_back(i.experts[3].levels[0]); });
    refuse("a section short of a byte", [](PackIndex& i) { --i.sections[0].extents[0].length; });
    refuse("a section of 2^63 bytes", [](PackIndex& i) { i.sections[0].extents[0].length = uint64_t{1} << 63; });
    refuse("a matrix beyond its section", [](PackIndex& i) { i.experts[3].levels[0].parts[1].offset += 1 << 20; });
    refuse("a matrix of 2^60 elements",
           [](PackIndex& i) { i.experts[3].levels[0].parts[2].rows = i.experts[3].levels[0].parts[2].cols = 1 << 30; });
}

}  // namespace

void test_placement() {
    const File file;
    test_places(file);
    test_impossible_places(file);
    test_impossible_experts();
}

}  // namespace edgemoe::tests
