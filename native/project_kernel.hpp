// How a projection is cut into pieces, and the seam between its entry and the instruction sets.
#pragma once

#include <stdint.h>

#include "project.h"

namespace nmflow {

// A piece is a part of one row, whole blocks but for the row's end; its survivors are first found as bits, bit i for
// entry i, and then written out, from L1. Short pieces let the stores of one overlap with the selection in the next
// (1024 entries were a fifth faster than 2048), but a method that has a block in each lane must find that many in one.
constexpr int64_t piece_entries = 1024;
constexpr int64_t most_lanes = 16;
constexpr int64_t piece_words = NMFLOW_PROJECT_LARGEST_M / 64 + 2;

// Where rows are neighbours, a piece is that part of a panel of rows, as many as a word has bits; its keys stay in L2.
constexpr int64_t panel_rows = 64;
constexpr int64_t panel_entries = 128;

struct Projection {
    nmflow_projection job;
    int64_t piece;           // entries of a piece; the last of a row may be shorter
    int64_t pieces_per_row;  // or per panel; one where a row has taps
    bool stream;
};

// Does the pieces [begin, end) and returns how many entries of the mask changed, or -1 for want of scratch memory.
using ProjectKernel = int64_t (*)(const Projection &, int64_t begin, int64_t end);

struct ProjectKernels {
    ProjectKernel rows[3], groups[3], columns[3], taps[3];  // in the order of the dtypes' numbers
};

// One table an instruction set; null where the library was built without it.
extern const ProjectKernels *const project_portable;
extern const ProjectKernels *const project_avx2;
extern const ProjectKernels *const project_avx512;

}  // namespace nmflow
