// edgemoe_tests [NAME...]: runs the named groups of tests, or all. The exit status is 1 if one fails.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string_view>

namespace edgemoe::tests {
void test_kernels();
void test_thread_pool();
void test_placement();
void test_store();
void test_sequence_state();
void test_backend();
void test_device_tier();
void test_emulator();
void test_engine();
void test_clients();
void test_golden();
}  // namespace edgemoe::tests

int main(int argc, char** argv) {
    using namespace edgemoe::tests;
    struct Group {
        std::string_view name;
        void (*run)();
    };
    constexpr Group groups[] = {{"kernels", test_kernels},
                                {"thread_pool", test_thread_pool},
                                {"placement", test_placement},
                                {"store", test_store},
                                {"sequence_state", test_sequence_state},
                                {"backend", test_backend},
                                {"device_tier", test_device_tier},
                                {"emulator", test_emulator},
                                {"engine", test_engine},
                                {"clients", test_clients},
                                {"golden", test_golden}};
    for (int i = 1; i < argc; ++i) {
        bool known = false;
        for (const Group& group : groups) known |= group.name == argv[i];
        if (!known) {
            std::fprintf(stderr, "there is no group %s; known:", argv[i]);
            for (const Group& group : groups) std::fprintf(stderr, " %s", group.name.data());
            std::fprintf(stderr, "\n");
            return 2;
        }
    }
    int failures = 0;
    for (const Group& group : groups) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) wanted |= group.name == argv[i];
        if (!wanted) continue;
        const auto begin = std::chrono::steady_clock::now();
        try {
            group.run();
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
            std::printf("%s: passed (%.1f s)\n", group.name.data(), taken.count());
        } catch (const std::exception& error) {
            std::printf("%s: FAILED: %s\n", group.name.data(), error.what());
            ++failures;
        }
        std::fflush(stdout);
    }
    return failures ? 1 : 0;
}
