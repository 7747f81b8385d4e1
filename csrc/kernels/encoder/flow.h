// Many samples through the encoder without a barrier: a piece is some sequences of one layer, run from gather
// to scatter by one thread while their rows are in its cache. Pieces are taken in the order of layers. A
// sequence waits for nobody but itself, one layer before, so threads do not meet at the end of a layer.
//
// No deadlock: what a piece waits for is of an earlier layer (the rows of one are distinct), so it was taken
// before it, and the earliest piece taken waits for nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/encoder/checks.h"

namespace dynplan::kernels {

struct Piece {
  int64_t layer;
  int64_t first, last;  // sequences of the layer's dispatch
};

class Flow {
 public:
  // Pieces of about target(active rows of the layer) rows.
  template <class Target>
  Flow(const DispatchView& d, Target target)
      : d_(d), earlier_(d.layers * d.samples), finished_(new std::atomic<int32_t>[d.capacity]) {
    std::vector<int32_t> layers(d.capacity), rows(d.capacity);  // of a sample so far, by its first row
    std::vector<int32_t> firsts(d.capacity, -1);                // by row: the first of the sequence it was in
    for (int64_t layer = 0; layer < d.layers; ++layer) {
      for (int64_t s = 0; s < d.counts[2 * layer]; ++s) {
        const int32_t length = offset(layer, s + 1) - offset(layer, s);
        if (length == 0) continue;
        const int32_t at = first_row(layer, s);
        earlier_[layer * d.samples + s] = layers[at]++;
        chain_ = std::max<int64_t>(chain_, rows[at] += length);
        longest_ = std::max<int64_t>(longest_, length);
        for (int32_t r = offset(layer, s); r < offset(layer, s + 1); ++r) {
          int32_t& first = firsts[d.rows[layer * d.capacity + r]];
          regroups_ |= first >= 0 && first != at;
          first = at;
        }
      }
      if (d.counts[2 * layer + 1] > 0) cut(layer, target(d.counts[2 * layer + 1]));
    }
    for (int64_t row = 0; row < d.capacity; ++row) finished_[row].store(0, std::memory_order_relaxed);
  }

  // The next piece, or null.
  const Piece* take() {
    const size_t taken = next_.fetch_add(1, std::memory_order_relaxed);
    return taken < pieces_.size() ? &pieces_[taken] : nullptr;
  }

  int64_t rows() const { return rows_; }        // of the largest piece
  int64_t longest() const { return longest_; }  // sequence
  int64_t layers() const { return layers_; }    // that have rows
  // Whether some row changes from one sequence to another between layers, as in no dispatch of
  // build_dispatch: then a sequence has to wait for more than itself, and pieces must run in their order.
  bool regroups() const { return regroups_; }
  // Rows times layers: of all samples, and of the one with most, which cannot be in two layers at once.
  int64_t work() const { return work_; }
  int64_t chain() const { return chain_; }

  bool is_ready(const Piece& piece) const {
    return every(piece, [&](int64_t s, std::atomic<int32_t>& finished) {
      return finished.load(std::memory_order_acquire) >= earlier_[piece.layer * d_.samples + s];
    });
  }
  void finish(const Piece& piece) {
    every(piece, [](int64_t, std::atomic<int32_t>& finished) {
      finished.fetch_add(1, std::memory_order_release);
      return true;
    });
  }

 private:
  int32_t offset(int64_t layer, int64_t s) const { return d_.cu_seqlens[layer * (d_.samples + 1) + s]; }
  int32_t first_row(int64_t layer, int64_t s) const {
    return d_.rows[layer * d_.capacity + offset(layer, s)];
  }

  // Whether f holds for every sequence of the piece that has rows.
  template <class F>
  bool every(const Piece& piece, F f) const {
    for (int64_t s = piece.first; s < piece.last; ++s)
      if (offset(piece.layer, s) < offset(piece.layer, s + 1) && !f(s, finished_[first_row(piece.layer, s)]))
        return false;
    return true;
  }

  void cut(int64_t layer, int64_t target) {
    const int64_t sequences = d_.counts[2 * layer], active = d_.counts[2 * layer + 1];
    const int64_t count = (active + target - 1) / target;
    for (int64_t first = 0, piece = 1; piece <= count; ++piece) {
      int64_t last = first;
      while (last < sequences && offset(layer, last) < active * piece / count) ++last;
      if (first == last) continue;
      rows_ = std::max<int64_t>(rows_, offset(layer, last) - offset(layer, first));
      pieces_.push_back({layer, first, last});
      first = last;
    }
    work_ += active;
    ++layers_;
  }

  const DispatchView d_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> earlier_;                      // (L, B): layers that a sequence has to have behind it
  std::unique_ptr<std::atomic<int32_t>[]> finished_;  // (T,): and has, by its first row
  std::atomic<size_t> next_{0};
  int64_t rows_ = 0, longest_ = 0, layers_ = 0, work_ = 0, chain_ = 0;
  bool regroups_ = false;
};

}  // namespace dynplan::kernels
