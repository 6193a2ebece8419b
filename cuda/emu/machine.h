// What the emulator knows of a running block: shared by runtime.cpp, which runs it, and checker.cpp, which watches it.
#pragma once
#include "emu.h"

#include <algorithm>
#include <vector>

namespace emu {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned STACK_BYTES = (128 << 10) + 5 * 64;    // not a power of two: the tops would share one set of the cache
constexpr unsigned MAX_GRID_YZ = 65535, MAX_THREADS_Z = 64;
constexpr size_t MAX_SMEM = 227 << 10, MAX_STATIC_SMEM = 48 << 10;     // a block of sm_90; static has a limit of its own
constexpr unsigned NOBODY = ~0u;

// A cp.async that was issued and has not landed.
struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned n_bytes, group;
    bool is_read;
    const void* pc;
};

struct Context;                               // a fiber that does not run: a stack pointer, or a ucontext_t

struct Warp;
struct Fiber {
    Context* context;
    unsigned char* stack;
    unsigned index, lane;
    uint64_t thread;                          // threadIdx
    Warp* warp;
    const char* waits_in;                     // barrier or collective, null when it runs
    const char* file;
    int line;
    bool is_done;
    unsigned n_groups;                        // groups of copies committed so far
    std::vector<Copy> copies;                 // in flight
    uint64_t* log;                            // accesses since the warp last converged (checker.cpp)
    unsigned n_log, log_capacity;
};

// The lanes named by one mask, on their way into one collective.
struct Group { unsigned mask, n_arrived; Op op; };

struct Warp {
    unsigned lanes, done;                     // lanes there are, lanes that have returned
    Group groups[32];                         // at the lowest lane of the mask
    void* args[32];                           // what each lane left for the one that comes last
    unsigned last_sync, pair_sync[32][32];    // clock of the last __syncwarp of all lanes, of two lanes
};

// Where a loaded kernel file lies in memory.
struct Module {
    size_t begin, end;                        // code and constants
    size_t tls_module, static_smem_bytes;     // its thread-local block is its static shared memory
};

// What is wrong. {at} and {other} in text stand for the lines of pc and other_pc, {address} for what lies at address.
struct Report {
    unsigned is_error, block[3];
    uint64_t pc, other_pc, address;
    char text[512];
};

struct Segment { uint64_t begin, end; };      // one argument's bytes in the arena; aliases share one

struct Launch {
    void (*run)(void**);
    void** args;
    const Module* module;
    unsigned grid[3], dim[3];
    uint64_t smem_bytes;
    unsigned n_workers, is_checked;
    double time_limit_s;                      // of CPU time for one block
    const Segment* segments;
    unsigned n_segments;
};

// Traffic of one line of the kernel in one memory space.
struct Site { uint64_t n_requests, n_bytes, moved_bytes, n_extra_wavefronts; };

// The last accesses of 4 bytes: two writers and two readers.
struct Cell { uint64_t write[2], read[2]; };
struct GlobalCell { size_t granule; Cell cell; };       // of global memory, where they were last

// One OS thread's place to run blocks.
struct Machine {
    Fiber fibers[MAX_THREADS];
    Warp warps[32];
    Fiber* self;
    size_t stack;                             // of self
    uint64_t block, block_dim, grid_dim;
    unsigned short queue[MAX_THREADS + 1];
    unsigned head, tail, n_threads, n_done, n_at_barrier;
    const char* barrier_file;
    int barrier_line;
    Context* main_context;
    unsigned char* stacks;
    unsigned char* smem;                      // dynamic
    unsigned char* static_smem;
    const Launch* launch;
    Report report;
    uint64_t n_blocks, n_blocks_seen;         // for the watchdog
    unsigned n_ticks;
    volatile bool holds_heap;
    bool is_checked;
    // the checker's
    const void* last_pc;
    unsigned clock, block_sync;               // counts syncs; the value at the last __syncthreads
    unsigned char* smem_state;
    Cell* cells;                              // of shared memory
    GlobalCell* global_cells;
    Site* sites;
    std::vector<unsigned> touched_sites;
    uint64_t segment_moved[64];
};

extern thread_local Machine* machine __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(const void* pc, const void* other_pc, uint64_t address, const char* format, ...);

namespace check {
void start_launch(const Launch& launch);
void start_machine(Machine& m);
void start_block(Machine& m);
void converge(Machine& m, Warp& warp);        // all lanes of the warp are here: account for their accesses
void sync_block(Machine& m);
void sync_warp(Machine& m, Warp& warp, unsigned mask);
void end_machine(Machine& m);                 // adds up, under the launch's lock
// An access by the running thread, of a copy or a collective.
void access(const void* p, unsigned n_bytes, bool is_write, const void* pc);
void forget(void* p, unsigned n_bytes);       // shared bytes that a copy in flight will write hold nothing
void land(void* p, unsigned n_bytes, const void* pc);
}  // namespace check

}  // namespace emu
