// SPDX-License-Identifier: Apache-2.0
// Exact rectangular assignment by shortest augmenting paths (Crouse, "On implementing 2D
// rectangular assignment algorithms", IEEE TAES 2016; Jonker and Volgenant, Computing 1987), on raw
// pointers and over a lane policy: OneLane below on a CPU, the 32 lanes of a warp (warp_lanes.cuh)
// on a GPU. Both take the same steps and find the same assignment.
//
// Rows are the side with fewer members, so that every row gets a column. How to use it:
//   place_state        lays the state out in state_bytes() of memory
//   clear_state        any number of lanes, then a barrier
//   find_row_minima    Ties::kAny only: any number of warps share out the rows, then a barrier
//   shortest_paths     one warp; the result is row_of_column and column_of_row
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace detr_fast {

// Which optimum is found where there are several: any, by a warm start, or that of
// scipy.optimize.linear_sum_assignment, by the same operations in the same order.
enum class Ties { kAny, kScipy };

constexpr int kFree = -1;

// Rows and columns of a problem. scipy transposes only where there are fewer targets than queries:
// where there are as many, its rows are the queries.
struct AssignmentShape {
  int rows, columns;
  bool targets_are_rows;
};

DETR_FAST_HOST_DEVICE AssignmentShape assignment_shape(int queries, int targets) {
  if (targets < queries) return {targets, queries, true};
  return {queries, targets, false};
}

// The cost of each row, side by side over the columns; +inf or NaN forbids a pair. Row i and row
// i + distinct are one and the same (a target that is matched several times).
template <typename scalar_t>
struct CostRows {
  scalar_t* data;
  int stride, distinct;

  DETR_FAST_HOST_DEVICE scalar_t* row(int i) const {
    return data + size_t(i < distinct ? i : i % distinct) * stride;
  }
};

// Where the costs (problems, queries, targets) of linear_sum_assignment lie.
template <typename scalar_t>
struct CostView {
  const scalar_t* data;
  int64_t problem_step, query_step, target_step;
};

// Duals and lengths are float64 also where the costs are float32: a dual is a sum of differences of
// costs, and in float32 one large cost would take the digits of all small ones that it meets.
struct AssignmentState {
  int rows, columns;
  double* row_dual;        // (rows)
  double* column_dual;     // (columns)
  double* length;          // (columns, padded) of the shortest path to a column; NaN once settled
  double* settled_length;  // (rows) the lengths of the settled columns, in their order
  int* settled_column;     // (rows)
  int* column_of_row;      // (rows) or kFree
  int* row_of_column;      // (columns) or kFree
  int* path;               // (columns) the row before a column on its shortest path
  int* remaining;          // (columns) Ties::kScipy: scipy's list of columns that are not settled
  int* position;           // (columns) Ties::kScipy: where a column stands in it
};

// Lengths are padded with infinity, so that a warp reads four of each lane at a time.
constexpr int kPadding = 128;

DETR_FAST_HOST_DEVICE int padded_columns(int columns) {
  return (columns + kPadding - 1) / kPadding * kPadding;
}

// Bytes of a state, a multiple of 16.
template <Ties kTies>
DETR_FAST_HOST_DEVICE size_t state_bytes(int rows, int columns) {
  constexpr size_t lists = kTies == Ties::kScipy ? 4 : 2;
  const size_t bytes = size_t(rows) * (2 * sizeof(double) + 2 * sizeof(int)) +
                       size_t(columns) * (sizeof(double) + lists * sizeof(int)) +
                       size_t(padded_columns(columns)) * sizeof(double);
  return (bytes + 15) / 16 * 16;
}

// Lays a state out in state_bytes() of memory that is aligned to 8 bytes.
template <Ties kTies>
DETR_FAST_HOST_DEVICE AssignmentState place_state(void* memory, int rows, int columns) {
  AssignmentState state = {rows, columns};
  state.length = static_cast<double*>(memory);
  state.column_dual = state.length + padded_columns(columns);
  state.row_dual = state.column_dual + columns;
  state.settled_length = state.row_dual + rows;
  state.settled_column = reinterpret_cast<int*>(state.settled_length + rows);
  state.column_of_row = state.settled_column + rows;
  state.row_of_column = state.column_of_row + rows;
  state.path = state.row_of_column + columns;
  state.remaining = kTies == Ties::kScipy ? state.path + columns : nullptr;
  state.position = kTies == Ties::kScipy ? state.remaining + columns : nullptr;
  return state;
}

// Nothing assigned, duals 0; lane `lane` of `lanes`.
DETR_FAST_HOST_DEVICE void clear_state(const AssignmentState& state, int lane, int lanes) {
  for (int i = lane; i < state.rows; i += lanes) {
    state.row_dual[i] = 0;
    state.column_of_row[i] = kFree;
  }
  for (int j = lane; j < state.columns; j += lanes) {
    state.column_dual[j] = 0;
    state.row_of_column[j] = kFree;
  }
  for (int j = state.columns + lane; j < padded_columns(state.columns); j += lanes) {
    state.length[j] = kInfinity;
  }
}

template <typename scalar_t>
struct RowMinimum {
  scalar_t value;
  int column;  // the first that has it; kFree where all are forbidden
};

// The unsettled column that is nearest: its length, and its rank among those as near, a number that
// is least for the column to take (see rank_of).
struct Nearest {
  double length;
  unsigned rank;
};

constexpr unsigned kOccupied = 1u << 31;  // of a rank: the column has a row
constexpr unsigned kNoRank = ~0u;

// Among columns of the same length a free one, which ends the search, goes before all others. Then
// the first counts, except that scipy takes the last of the free ones on its list.
template <Ties kTies>
DETR_FAST_HOST_DEVICE unsigned rank_of(const AssignmentState& state, int column) {
  const bool free = state.row_of_column[column] == kFree;
  if constexpr (kTies == Ties::kAny) return unsigned(column) | (free ? 0 : kOccupied);
  const unsigned position = unsigned(state.position[column]);
  return free ? unsigned(state.columns - 1) - position : position | kOccupied;
}

template <Ties kTies>
DETR_FAST_HOST_DEVICE int column_of_rank(const AssignmentState& state, unsigned rank) {
  const int index = int(rank & ~kOccupied);
  if constexpr (kTies == Ties::kAny) return index;
  return state.remaining[rank & kOccupied ? index : state.columns - 1 - index];
}

// Where a search stands: the paths that end in `row`, at the distance `reached`.
struct Front {
  double reached, dual;
  int row;
  bool first;  // no path has been looked at yet
};

// The length of the path over the front's row to a column: with scipy's roundings, or with one
// less.
template <Ties kTies>
DETR_FAST_HOST_DEVICE double path_length(Front front, double cost, double column_dual) {
  if constexpr (kTies == Ties::kScipy) return front.reached + cost - front.dual - column_dual;
  return cost - column_dual + (front.reached - front.dual);
}

// The lane policy of a CPU thread. Its loops are what GCC vectorises.
struct OneLane {
  static constexpr int kLanes = 1;

  DETR_FAST_HOST_DEVICE int lane() const { return 0; }
  DETR_FAST_HOST_DEVICE void sync() const {}
  // The lanes, as bits, that hold true.
  DETR_FAST_HOST_DEVICE unsigned ballot(bool bit) const { return bit; }
  // Whether this lane is the first of those that hold the same key.
  DETR_FAST_HOST_DEVICE bool leads(int) const { return true; }
  // The least value of all lanes.
  template <typename T>
  DETR_FAST_HOST_DEVICE T least(T value) const {
    return value;
  }

  template <typename scalar_t>
  DETR_FAST_HOST_DEVICE RowMinimum<scalar_t> row_minimum(const scalar_t* row, int columns) const {
    constexpr int kPiece = 16;  // as many running minima fill the widest vectors
    scalar_t least = scalar_t(kInfinity);
    scalar_t leasts[kPiece];
    for (int k = 0; k < kPiece; ++k) leasts[k] = least;
    int j = 0;
    for (; j + kPiece <= columns; j += kPiece) {
      for (int k = 0; k < kPiece; ++k) leasts[k] = row[j + k] < leasts[k] ? row[j + k] : leasts[k];
    }
    for (int k = 0; k < kPiece; ++k) least = leasts[k] < least ? leasts[k] : least;
    for (; j < columns; ++j) least = row[j] < least ? row[j] : least;
    if (!(least < scalar_t(kInfinity))) return {least, kFree};
    int column = columns;
    for (j = 0; j < columns; ++j) {
      const int found = row[j] == least ? j : columns;
      column = found < column ? found : column;
    }
    return {least, column};
  }

  // Looks at the paths over the front's row; returns the nearest column that is not settled.
  template <Ties kTies, typename scalar_t>
  DETR_FAST_HOST_DEVICE Nearest advance(const scalar_t* cost, const AssignmentState& state,
                                        Front front) const {
    const double least = front.first ? relax<kTies, true>(cost, state, front)
                                     : relax<kTies, false>(cost, state, front);
    return {least, least < kInfinity ? first_rank<kTies>(state, least) : kNoRank};
  }

 private:
  template <Ties kTies, bool kFirst, typename scalar_t>
  static DETR_FAST_HOST_DEVICE double relax(const scalar_t* __restrict cost,
                                            const AssignmentState& state, Front front) {
    const double* __restrict column_dual = state.column_dual;
    double* __restrict length = state.length;
    int* __restrict path = state.path;
    const int columns = state.columns, row = front.row;
    double least = kInfinity;
#pragma omp simd reduction(min : least)
    for (int j = 0; j < columns; ++j) {
      const double over_row = path_length<kTies>(front, double(cost[j]), column_dual[j]);
      const double known = kFirst ? kInfinity : length[j];
      const bool shorter = over_row < known;
      const double now = shorter ? over_row : known;
      length[j] = now;
      // a choice would become a masked store behind a branch
      path[j] = kFirst ? row : path[j] ^ ((path[j] ^ row) & -int(shorter));
      least = now < least ? now : least;
    }
    return least;
  }

  template <Ties kTies>
  static DETR_FAST_HOST_DEVICE unsigned first_rank(const AssignmentState& state, double least) {
    const double* __restrict length = state.length;
    unsigned first = kNoRank;
#pragma omp simd reduction(min : first)
    for (int j = 0; j < state.columns; ++j) {
      const unsigned rank = rank_of<kTies>(state, j);
      first = length[j] == least && rank < first ? rank : first;
    }
    return first;
  }
};

// The least cost of the rows first, first + step, ..., as their dual and their wish.
template <typename Lanes, typename scalar_t>
DETR_FAST_HOST_DEVICE void find_row_minima(Lanes lanes, CostRows<scalar_t> costs,
                                           const AssignmentState& state, int first, int step) {
  const int distinct = costs.distinct < state.rows ? costs.distinct : state.rows;
  for (int i = first; i < distinct; i += step) {
    const RowMinimum<scalar_t> minimum = lanes.row_minimum(costs.row(i), state.columns);
    for (int copy = i + lanes.lane() * distinct; copy < state.rows;
         copy += Lanes::kLanes * distinct) {
      state.row_dual[copy] = minimum.column == kFree ? 0 : double(minimum.value);
      state.column_of_row[copy] = minimum.column;
    }
  }
}

// Gives the rows the columns that they wish, the first row first; the others stay free.
template <typename Lanes>
DETR_FAST_HOST_DEVICE void claim_row_minima(Lanes lanes, const AssignmentState& state) {
  for (int base = 0; base < state.rows; base += Lanes::kLanes) {
    const int i = base + lanes.lane();
    const int wish = i < state.rows ? state.column_of_row[i] : kFree;
    const bool leads = lanes.leads(wish);
    if (wish != kFree) {
      if (leads && state.row_of_column[wish] == kFree) {
        state.row_of_column[wish] = i;
      } else {
        state.column_of_row[i] = kFree;
      }
    }
    lanes.sync();
  }
}

// Gives the free row `start` a column by the shortest augmenting path; false where there is none.
template <Ties kTies, typename Lanes, typename scalar_t>
DETR_FAST_HOST_DEVICE bool augment(Lanes lanes, CostRows<scalar_t> costs,
                                   const AssignmentState& state, int start) {
  if constexpr (kTies == Ties::kScipy) {
    for (int j = lanes.lane(); j < state.columns; j += Lanes::kLanes) {
      state.remaining[j] = state.position[j] = state.columns - 1 - j;
    }
    lanes.sync();
  }
  // every step settles a column that has a row, or ends: there are fewer than rows
  double reached = 0;
  int row = start, column = kFree, settled = 0;
  for (;; ++settled) {
    const Front front = {reached, state.row_dual[row], row, settled == 0};
    const Nearest nearest = lanes.template advance<kTies>(costs.row(row), state, front);
    reached = nearest.length;
    if (!(reached < kInfinity)) return false;
    column = column_of_rank<kTies>(state, nearest.rank);
    row = state.row_of_column[column];
    if (row == kFree) break;
    lanes.sync();
    if (column % Lanes::kLanes == lanes.lane()) {  // the lane that looks at this column
      state.length[column] = __builtin_nan("");
      state.settled_column[settled] = column;
      state.settled_length[settled] = reached;
      if constexpr (kTies == Ties::kScipy) {  // the list's last column moves to where it stood
        const int last = state.remaining[state.columns - 1 - settled];
        state.remaining[state.position[column]] = last;
        state.position[last] = state.position[column];
      }
    }
    lanes.sync();
  }
  lanes.sync();
  for (int k = lanes.lane(); k < settled; k += Lanes::kLanes) {
    const int j = state.settled_column[k];
    const double nearer = reached - state.settled_length[k];
    state.column_dual[j] -= nearer;
    state.row_dual[state.row_of_column[j]] += nearer;
  }
  lanes.sync();
  if (lanes.lane() == 0) {
    state.row_dual[start] += reached;
    for (int i = kFree; i != start;) {
      i = state.path[column];
      state.row_of_column[column] = i;
      const int before = state.column_of_row[i];
      state.column_of_row[i] = column;
      column = before;
    }
  }
  lanes.sync();
  return true;
}

// Assigns a column to every row; false where no assignment has a finite cost.
template <Ties kTies, typename Lanes, typename scalar_t>
DETR_FAST_HOST_DEVICE bool shortest_paths(Lanes lanes, CostRows<scalar_t> costs,
                                          const AssignmentState& state) {
  if constexpr (kTies == Ties::kAny) claim_row_minima(lanes, state);
  for (int base = 0; base < state.rows; base += Lanes::kLanes) {
    const int i = base + lanes.lane();
    unsigned pending = lanes.ballot(i < state.rows && state.column_of_row[i] == kFree);
    for (int start = base; pending != 0; ++start, pending >>= 1) {
      if ((pending & 1) && !augment<kTies>(lanes, costs, state, start)) return false;
    }
  }
  return true;
}

}  // namespace detr_fast
