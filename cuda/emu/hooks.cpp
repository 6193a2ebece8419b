// What g++ -fsanitize=thread makes a kernel call: a hook before each load and store, a function in the place of each atomic.
// A part of checker.cpp.
#define HERE __builtin_return_address(0)
#define HOOK(name, kind, n, alignment, is_struct) \
    extern "C" void __tsan_##name##n(void* p) { emu::check::on_access<emu::kind, is_struct>((size_t)p, n, alignment, HERE); }
#define HOOKS(n, is_struct)                                                                                 \
    HOOK(read, READ, n, n < 8 ? n : 8, is_struct) HOOK(write, WRITE, n, n < 8 ? n : 8, is_struct)           \
    HOOK(unaligned_read, READ, n, 1, is_struct) HOOK(unaligned_write, WRITE, n, 1, is_struct)               \
    HOOK(volatile_read, READ, n, n, false) HOOK(volatile_write, WRITE, n, n, false)
HOOKS(1, false) HOOKS(2, false) HOOKS(4, false) HOOKS(8, false)
HOOKS(16, true)                                          // volatile: a vector type of emu.h, else a struct of 16 bytes

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Structs of other sizes, in the largest pieces that fit.
template <emu::Kind kind> static void on_range(void* p, size_t n_bytes, const void* pc) {
    for (size_t a = (size_t)p; n_bytes;) {
        unsigned piece = 16;
        while (piece > n_bytes || a % piece) piece /= 2;
        emu::check::on_access<kind, true>(a, piece, 1, pc);
        a += piece;
        n_bytes -= piece;
    }
}
extern "C" void __tsan_read_range(void* p, size_t n_bytes) { on_range<emu::READ>(p, n_bytes, HERE); }
extern "C" void __tsan_write_range(void* p, size_t n_bytes) { on_range<emu::WRITE>(p, n_bytes, HERE); }

extern "C" void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
#define UPDATE(bits, name, builtin)                                                           \
    extern "C" uint##bits##_t __tsan_atomic##bits##_##name(uint##bits##_t* p, uint##bits##_t value, int) { \
        emu::check::on_access<emu::ATOMIC>((size_t)p, bits / 8, bits / 8, HERE);                 \
        return builtin(p, value, __ATOMIC_SEQ_CST);                                          \
    }
#define ATOMICS(bits)                                                                                                 \
    UPDATE(bits, exchange, __atomic_exchange_n)                                                                       \
    UPDATE(bits, fetch_add, __atomic_fetch_add)                                                                       \
    UPDATE(bits, fetch_sub, __atomic_fetch_sub)                                                                       \
    UPDATE(bits, fetch_and, __atomic_fetch_and)                                                                       \
    UPDATE(bits, fetch_or, __atomic_fetch_or)                                                                         \
    extern "C" uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) {    /* half of an update */   \
        emu::check::on_access<emu::ATOMIC, false, false>((size_t)p, bits / 8, bits / 8, HERE);                        \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                  \
    }                                                                                                                 \
    extern "C" void __tsan_atomic##bits##_store(uint##bits##_t* p, uint##bits##_t value, int) {                       \
        emu::check::on_access<emu::ATOMIC>((size_t)p, bits / 8, bits / 8, HERE);                                      \
        __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                                 \
    }                                                                                                                 \
    extern "C" int __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* p, uint##bits##_t* expected,         \
                                                                 uint##bits##_t value, int, int) {                    \
        emu::check::on_access<emu::ATOMIC>((size_t)p, bits / 8, bits / 8, HERE);                                      \
        return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
    }
ATOMICS(16) ATOMICS(32) ATOMICS(64)
