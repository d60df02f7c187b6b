// Threads that never outlive what they work on, even when one of them cannot be started.
#pragma once

#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace edgemoe {

// A thread could not be started. The message says how many were asked for and what for.
struct ThreadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Threads that run the same function. They are stopped and joined by the destructor, and by start() if one of them
// cannot be started, so that no exception ever meets a running thread. As a member it stands after everything that its
// threads use: it is then the first to go.
class ThreadGroup {
  public:
    ThreadGroup() = default;
    ~ThreadGroup() { stop_and_join(); }
    ThreadGroup(const ThreadGroup&) = delete;
    ThreadGroup& operator=(const ThreadGroup&) = delete;

    // Starts threads that run body(number) for the numbers first ... end - 1; numbers before `first` are threads that
    // the caller has already, its own for example. `stop` makes every running body return soon; it must not throw.
    // Throws ThreadError, and none of these threads runs then; `purpose` is for its message ("read experts"). To be
    // called once.
    template <class Body>
    void start(const char* purpose, int first, int end, Body body, std::function<void()> stop) {
        stop_ = std::move(stop);
        try {
            threads_.reserve(static_cast<size_t>(end > first ? end - first : 0));
            for (int number = first; number < end; ++number)
                threads_.emplace_back([this, body, number] {
                    try {
                        body(number);
                    } catch (...) {
                        const std::lock_guard lock(mutex_);
                        if (!error_) error_ = std::current_exception();
                    }
                });
        } catch (const std::system_error& error) {
            const int started = first + size();
            stop_and_join();
            fail(purpose, started, end, error);
        } catch (...) {
            stop_and_join();
            throw;
        }
    }

    // Waits until every body has returned by itself, and throws the first exception that one of them threw.
    void join();

    int size() const { return static_cast<int>(threads_.size()); }

  private:
    void stop_and_join();
    [[noreturn]] static void fail(const char* purpose, int started, int count, const std::system_error& error);

    std::function<void()> stop_;
    std::mutex mutex_;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

}  // namespace edgemoe
