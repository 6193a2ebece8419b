// Which keys a query sees and where they are: the new tokens of one sequence, and its pages.
//
//   page_table [n_entries] int32   position p of the sequence is in page page_table[page_begin + p / page_size]
//   n_new, context                 its new tokens have positions context - n_new .. context - 1; the first of them is
//                                  first_token of the step
//   last_visible                   of each new token, or null: then a token sees nothing behind itself
//   first_visible                  of each new token, or null: where it is before what the window shows, it counts
#pragma once
#include "device.cuh"

struct Interval { int first, last; };

struct PagedSequence {
    const int* page_table;
    const int* first_visible;
    const int* last_visible;
    int first_token, page_begin, page_size, n_new, context, window, chunk;

    // Where a position lies: page * page_size + offset.
    __device__ __forceinline__ int slot(int position) const {
        return page_table[page_begin + position / page_size] * page_size + position % page_size;
    }

    // The positions that new token `i` sees. No position may be asked for beyond the pages: hence context.
    __device__ __forceinline__ Interval visible(int i) const {
        const int position = context - n_new + i;
        const int first = max(position / chunk * chunk, position - window + 1);
        return {first_visible ? min(first_visible[first_token + i], first) : first,
                last_visible ? min(last_visible[first_token + i], context - 1) : position};
    }
};
