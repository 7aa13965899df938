// SPDX-License-Identifier: Apache-2.0
// Assignment by auction (Bertsekas, "The auction algorithm", Annals of Operations Research 1988),
// over the state and the lane policies of assignment.h. Rows bid for columns, first with a coarse
// epsilon, then with finer ones; where columns stay over, those that are dearer than one that was
// sold are sold in turn (Bertsekas and Castanon, "A forward/reverse auction algorithm for
// asymmetric assignment problems", Computational Optimization and Applications 1992).
//
// The result costs at most rows * epsilon more than the optimum, with epsilon = kAuctionTolerance
// times the range of the costs.
#pragma once

#include "matcher/assignment.h"

namespace detr_fast {

constexpr double kAuctionTolerance = 1e-7;
constexpr double kAuctionScaling = 5;  // of epsilon from phase to phase
// Bids for each row and column. A price war goes on for as many bids as epsilon goes into the
// difference of two costs; an auction that comes to the end of these is given up.
constexpr int64_t kAuctionBids = 100;

// The least of n values, the least of the others and the index of the first.
struct TwoLeast {
  double least, second;
  int index;
};

template <typename Lanes, typename Value>
DETR_FAST_HOST_DEVICE TwoLeast two_least(Lanes lanes, int n, const Value& value) {
  double own = kInfinity, own_second = kInfinity;
  unsigned own_index = unsigned(kFree);
  for (int i = lanes.lane(); i < n; i += Lanes::kLanes) {
    const double candidate = value(i);
    own_second = smaller(own_second, larger(candidate, own));
    own_index = candidate < own ? unsigned(i) : own_index;
    own = smaller(own, candidate);
  }
  const double least = lanes.least(own);
  const unsigned index = lanes.least(own == least ? own_index : unsigned(kFree));
  return {least, lanes.least(own_index == index ? own_second : own), int(index)};
}

// An auction whose prices are the column duals. The row dual is what a row pays for its column,
// cost and price together; no other column is cheaper for it by more than epsilon.
template <typename Lanes, typename scalar_t>
class Auction {
 public:
  DETR_FAST_HOST_DEVICE Auction(Lanes lanes, CostRows<scalar_t> costs, AssignmentState state)
      : lanes_(lanes), costs_(costs), state_(state) {
    bids_left_ = kAuctionBids * (int64_t(state.rows) + state.columns);
  }

  // Assigns a column to every row of a cleared state. False if it gave up, or cannot begin: where
  // costs are not finite a row may have one column alone, for which no price is too high.
  DETR_FAST_HOST_DEVICE bool run() {
    if (state_.rows == 0) return true;
    const double range = find_range();
    if (!(range < kInfinity)) return false;
    const double finest = range > 0 ? kAuctionTolerance * range : 1;
    for (double epsilon = range / 4;; epsilon /= kAuctionScaling) {
      epsilon = larger(epsilon, finest);
      if (!sell_to_rows(epsilon)) return false;
      if (epsilon == finest) return sell_leftovers(epsilon);
      forget();
    }
  }

 private:
  // Costs count from the least one, so that what they have in common takes no digits of a price.
  DETR_FAST_HOST_DEVICE double cost(int i, int j) const {
    return double(costs_.row(i)[j]) - least_cost_;
  }

  DETR_FAST_HOST_DEVICE double find_range() {
    double least = kInfinity, most = -kInfinity;
    bool finite = true;
    for (int i = 0; i < state_.rows && i < costs_.distinct; ++i) {
      const scalar_t* row = costs_.row(i);
      for (int j = lanes_.lane(); j < state_.columns; j += Lanes::kLanes) {
        const double value = double(row[j]);
        finite = finite && value - value == 0;
        least = smaller(least, value);
        most = larger(most, value);
      }
    }
    if (lanes_.ballot(!finite)) return kInfinity;
    least_cost_ = lanes_.least(least);
    return -lanes_.least(-most) - least_cost_;
  }

  // Takes all columns back; the prices stay.
  DETR_FAST_HOST_DEVICE void forget() {
    for (int i = lanes_.lane(); i < state_.rows; i += Lanes::kLanes)
      state_.column_of_row[i] = kFree;
    for (int j = lanes_.lane(); j < state_.columns; j += Lanes::kLanes) {
      state_.row_of_column[j] = kFree;
    }
    lanes_.sync();
  }

  // Row i pays `total` for column j from now on, of which `price` goes to the column.
  DETR_FAST_HOST_DEVICE void sell(int i, int j, double total, double price) {
    lanes_.sync();
    if (lanes_.lane() == 0) {
      if (state_.row_of_column[j] != kFree) state_.column_of_row[state_.row_of_column[j]] = kFree;
      if (state_.column_of_row[i] != kFree) state_.row_of_column[state_.column_of_row[i]] = kFree;
      state_.row_of_column[j] = i;
      state_.column_of_row[i] = j;
      state_.row_dual[i] = total;
      state_.column_dual[j] = price;
    }
    lanes_.sync();
  }

  // Forward: each row bids for its cheapest column; whose column is taken, bids next.
  DETR_FAST_HOST_DEVICE bool sell_to_rows(double epsilon) {
    for (int first = 0; first < state_.rows; ++first) {
      for (int i = first; i != kFree;) {
        if (bids_left_-- == 0) return false;
        const scalar_t* row = costs_.row(i);
        const TwoLeast offer = two_least(lanes_, state_.columns, [&](int j) {
          return (double(row[j]) - least_cost_) + state_.column_dual[j];
        });
        const int j = offer.index, loser = state_.row_of_column[j];
        const double second = offer.second < kInfinity ? offer.second : offer.least;
        sell(i, j, second + epsilon, state_.column_dual[j] + (second - offer.least) + epsilon);
        i = loser;
      }
    }
    return true;
  }

  // Reverse: a column that is left over and dearer than one that was sold becomes as cheap, or goes
  // to the row that gives most for it.
  DETR_FAST_HOST_DEVICE bool sell_leftovers(double epsilon) {
    double own = kInfinity;
    for (int j = lanes_.lane(); j < state_.columns; j += Lanes::kLanes) {
      if (state_.row_of_column[j] != kFree) own = smaller(own, state_.column_dual[j]);
    }
    const double cheapest = lanes_.least(own);
    for (int first = 0; first < state_.columns; ++first) {
      int j = state_.row_of_column[first] == kFree ? first : kFree;
      while (j != kFree && state_.column_dual[j] > cheapest) {
        if (bids_left_-- == 0) return false;
        const TwoLeast offer =
            two_least(lanes_, state_.rows, [&](int i) { return cost(i, j) - state_.row_dual[i]; });
        const int i = offer.index, freed = state_.column_of_row[i];
        const double most = -offer.least;  // the price at which row i would change columns
        if (cheapest >= most - epsilon) {
          lanes_.sync();
          if (lanes_.lane() == 0) state_.column_dual[j] = cheapest;
          lanes_.sync();
          break;
        }
        const double gain = smaller(most - cheapest, most + offer.second + epsilon);
        sell(i, j, state_.row_dual[i] - gain, most - gain);
        j = freed;
      }
    }
    return true;
  }

  Lanes lanes_;
  CostRows<scalar_t> costs_;
  AssignmentState state_;
  int64_t bids_left_;
  double least_cost_ = 0;
};

// As shortest_paths, whose turn it is where the auction gives up.
template <typename Lanes, typename scalar_t>
DETR_FAST_HOST_DEVICE bool assign_by_auction(Lanes lanes, CostRows<scalar_t> costs,
                                             const AssignmentState& state) {
  if (Auction<Lanes, scalar_t>(lanes, costs, state).run()) return true;
  lanes.sync();
  clear_state(state, lanes.lane(), Lanes::kLanes);
  lanes.sync();
  find_row_minima(lanes, costs, state, 0, 1);
  lanes.sync();
  return shortest_paths<Ties::kAny>(lanes, costs, state);
}

}  // namespace detr_fast
