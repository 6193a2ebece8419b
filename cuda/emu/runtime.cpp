// The machine behind emu.h: fibers, barriers, warps, and blocks handed to OS threads. Built once, loaded once.
#include "emu.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#ifdef __x86_64__
// Saves the callee-saved registers on the stack, leaves the stack pointer in *save, and goes on from `load`.
extern "C" void emu_switch(void** save, void* load);
asm(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
#error "the emulator switches stacks in x86-64 assembly; other hosts need a port of emu_switch"
#endif

namespace emu {

thread_local Block* block;

constexpr unsigned MAX_THREADS = 1024, STACK_BYTES = 128 << 10, MAX_SMEM = 227 << 10;

// One OS thread's place to run blocks.
struct Machine : Block {
    Fiber fibers[MAX_THREADS];
    Warp warps[32];
    unsigned short queue[MAX_THREADS + 1];
    unsigned head, tail, n_threads, n_done, n_at_barrier;
    int barrier_line;
    void* main_sp;
    unsigned char* stacks;
    unsigned char* memory;
    void (*run)(void**);
    void** args;
    char error[512];
};

static Machine& machine() { return *(Machine*)block; }

static void push(Machine& m, unsigned i) {
    m.queue[m.tail] = (unsigned short)i;
    m.tail = m.tail == MAX_THREADS ? 0 : m.tail + 1;
}

static void fail(Machine& m, const char* format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(m.error, sizeof m.error, format, list);
    va_end(list);
    void* abandoned;
    emu_switch(&abandoned, m.main_sp);
}

static void describe_deadlock(Machine& m) {
    for (unsigned i = 0; i < m.n_threads; ++i) {
        Fiber& waiting = m.fibers[i];
        if (waiting.is_done) continue;
        for (unsigned j = 0; j < m.n_threads; ++j) {
            Fiber& other = m.fibers[j];
            if (other.is_done)
                fail(m, "thread %u waits in %s (line %d), thread %u has returned", i, waiting.waits_in, waiting.line, j);
            if (other.waits_in != waiting.waits_in || other.line != waiting.line)
                fail(m, "thread %u waits in %s (line %d), thread %u in %s (line %d)", i, waiting.waits_in, waiting.line,
                     j, other.waits_in, other.line);
        }
    }
    fail(m, "all threads wait");
}

// Runs the next fiber that can run.
static void park(Machine& m) {
    Fiber* me = m.self;
    if (m.head == m.tail) describe_deadlock(m);
    Fiber* next = &m.fibers[m.queue[m.head]];
    m.head = m.head == MAX_THREADS ? 0 : m.head + 1;
    if (next == me) return;
    m.self = next;
    emu_switch(&me->sp, next->sp);
}

void sync_block(int line) {
    Machine& m = machine();
    Fiber* me = m.self;
    if (m.n_at_barrier && m.barrier_line != line)
        fail(m, "thread %u is in __syncthreads (line %d) while others wait in the one of line %d", me->index, line,
             m.barrier_line);
    m.barrier_line = line;
    if (++m.n_at_barrier == m.n_threads) {
        m.n_at_barrier = 0;
        for (unsigned i = 0; i < m.n_threads; ++i)
            if (i != me->index) push(m, i);
        return;
    }
    me->waits_in = "__syncthreads";
    me->line = line;
    park(m);
    me->waits_in = nullptr;
}

bool join_warp(const char* what, int line) {
    Machine& m = machine();
    Fiber* me = m.self;
    Warp& warp = *me->warp;
    if (warp.n_arrived && warp.what != what)
        fail(m, "thread %u is in %s (line %d) while other lanes of its warp wait in %s", me->index, what, line,
             (const char*)warp.what);
    warp.what = what;
    if (++warp.n_arrived == warp.n_threads) return true;
    me->waits_in = what;
    me->line = line;
    park(m);
    me->waits_in = nullptr;
    return false;
}

void release_warp() {
    Machine& m = machine();
    Warp& warp = *m.self->warp;
    warp.n_arrived = 0;
    ++warp.generation;
    const unsigned first = m.self->index - m.self->lane;
    for (unsigned lane = 0; lane < warp.n_threads; ++lane)
        if (first + lane != m.self->index) push(m, first + lane);
}

static void fiber_main() {
    Machine& m = machine();
    m.run(m.args);
    m.self->is_done = true;
    if (++m.n_done == m.n_threads) {
        void* abandoned;
        emu_switch(&abandoned, m.main_sp);
    }
    park(m);
}

static void run_block(Machine& m, size_t smem_bytes) {
    m.n_threads = m.dim.x * m.dim.y * m.dim.z;
    m.head = m.tail = m.n_done = m.n_at_barrier = 0;
    memset(m.smem, 0xFF, smem_bytes);                    // NaN in every float format
    for (unsigned w = 0; 32 * w < m.n_threads; ++w) {
        m.warps[w].n_threads = m.n_threads - 32 * w < 32 ? m.n_threads - 32 * w : 32;
        m.warps[w].n_arrived = 0;
    }
    for (unsigned i = 0; i < m.n_threads; ++i) {
        Fiber& f = m.fibers[i];
        f.thread = {i % m.dim.x, i / m.dim.x % m.dim.y, i / (m.dim.x * m.dim.y)};
        f.index = i;
        f.lane = i % 32;
        f.warp = &m.warps[i / 32];
        f.waits_in = nullptr;
        f.is_done = false;
        void** top = (void**)(m.stacks + (size_t)(i + 1) * STACK_BYTES - 64);
        top[0] = (void*)fiber_main;                      // emu_switch returns into it with the stack aligned as a call
        top[1] = nullptr;
        f.sp = top - 6;
        push(m, i);
    }
    m.self = &m.fibers[m.queue[m.head++]];
    emu_switch(&m.main_sp, m.self->sp);
}

struct Launch {
    dim3 grid, dim;
    size_t smem_bytes;
    void (*run)(void**);
    void** args;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char* error;
    size_t error_bytes;
};

static std::vector<Machine*> idle;
static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;

static Machine* take_machine() {
    pthread_mutex_lock(&idle_lock);
    Machine* m = idle.empty() ? nullptr : idle.back();
    if (m) idle.pop_back();
    pthread_mutex_unlock(&idle_lock);
    if (m) return m;
    m = (Machine*)calloc(1, sizeof(Machine));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m->stacks = (unsigned char*)mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    m->smem = (unsigned char*)mmap(nullptr, MAX_SMEM + 4096, PROT_READ | PROT_WRITE, flags, -1, 0);
    return m;
}

static void* work(void* argument) {
    Launch& launch = *(Launch*)argument;
    Machine* m = take_machine();
    block = m;
    m->dim = launch.dim;
    m->grid = launch.grid;
    m->run = launch.run;
    m->args = launch.args;
    m->error[0] = 0;
    const uint64_t n = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    for (uint64_t i; !launch.failed && (i = launch.next++) < n;) {
        m->index = {(unsigned)(i % launch.grid.x), (unsigned)(i / launch.grid.x % launch.grid.y),
                    (unsigned)(i / launch.grid.x / launch.grid.y)};
        run_block(*m, launch.smem_bytes);
        if (m->error[0] && !launch.failed.exchange(true))
            snprintf(launch.error, launch.error_bytes, "block (%u, %u, %u): %s", m->index.x, m->index.y, m->index.z,
                     m->error);
    }
    block = nullptr;
    pthread_mutex_lock(&idle_lock);
    idle.push_back(m);
    pthread_mutex_unlock(&idle_lock);
    return nullptr;
}

}  // namespace emu

// Runs a kernel over a grid; `run` unpacks `args` and calls it for one thread. Returns 0, or 1 with `error` filled.
extern "C" int emu_launch(void (*run)(void**), void** args, const unsigned* grid, const unsigned* dim, size_t smem_bytes,
                          unsigned n_workers, char* error, size_t error_bytes) {
    using namespace emu;
    Launch launch;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.dim = {dim[0], dim[1], dim[2]};
    launch.smem_bytes = smem_bytes;
    launch.run = run;
    launch.args = args;
    launch.error = error;
    launch.error_bytes = error_bytes;
    if ((uint64_t)dim[0] * dim[1] * dim[2] > MAX_THREADS || smem_bytes > MAX_SMEM) {
        snprintf(error, error_bytes, "%u x %u x %u threads and %zu bytes of shared memory; a block has at most %u and %u",
                 dim[0], dim[1], dim[2], smem_bytes, MAX_THREADS, MAX_SMEM);
        return 1;
    }
    const uint64_t n_blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    std::vector<pthread_t> workers;
    for (unsigned i = 1; i < n_workers && i < n_blocks; ++i) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, work, &launch) == 0) workers.push_back(thread);
    }
    work(&launch);
    for (pthread_t thread : workers) pthread_join(thread, nullptr);
    return launch.failed;
}
