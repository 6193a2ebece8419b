// Online softmax in base 2, and the one way in which the sums of two stretches of keys become one.
//
//   (m, l, o)   of a stretch of keys: the maximum of the scores, the sum of exp2(score - m), and that of exp2(score - m) * v
//
// No keys at all is (-inf, 0, 0), and merging it on either side is an exact no-op, so it does not matter who merges it.
#pragma once
#include "mma.cuh"

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }

// A maximum to subtract: scores of -inf under a maximum of -inf must give exp2(-inf), not NaN.
__device__ __forceinline__ float finite_max(float m) { return m == minus_infinity() ? 0.f : m; }

struct MergeWeights { float old_part, new_part; };

// (m_old, l_old) of earlier keys and (m, l) of those behind them, into m and l; the weights are for merged(). Every product
// and sum is written as one rounding, so that no compiler contracts it one way here and another way there.
__device__ __forceinline__ MergeWeights merge_before(float m_old, float l_old, float& m, float& l) {
    const float top = fmaxf(m_old, m), shift = finite_max(top);
    const MergeWeights w = {exp2_approx(m_old - shift), exp2_approx(m - shift)};
    m = top;
    l = fmaf(l, w.new_part, __fmul_rn(l_old, w.old_part));
    return w;
}

__device__ __forceinline__ float merged(MergeWeights w, float o_old, float o) {
    return fmaf(o, w.new_part, __fmul_rn(o_old, w.old_part));
}
