// What stands between the kernels and numbers that anybody may have written: whatever the checks let through
// has to be safe.
#include <set>

#include "fuzz/guarded.h"
#include "fuzz/targets.h"
#include "kernels/encoder/flow.h"
#include "kernels/encoder/reduced_encoder.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

// Plainly, what the kernels rely on; -1 where it does not hold.
int64_t most_of_valid(const DispatchView& d) {
  int64_t most = 0;
  for (int64_t l = 0; l < d.layers; ++l) {
    const int64_t sequences = d.counts[2 * l], active = d.counts[2 * l + 1];
    if (sequences < 0 || sequences > d.samples || active < 0 || active > d.capacity) return -1;
    const int32_t* offsets = d.cu_seqlens + l * (d.samples + 1);
    if (offsets[0] != 0 || offsets[sequences] != active || !std::is_sorted(offsets, offsets + sequences + 1))
      return -1;
    std::set<int32_t> rows(d.rows + l * d.capacity, d.rows + l * d.capacity + active);
    if (static_cast<int64_t>(rows.size()) != active) return -1;
    if (active > 0 && (*rows.begin() < 0 || *rows.rbegin() >= d.capacity)) return -1;
    most = std::max(most, active);
  }
  return most;
}

// Every sequence that has rows is in one piece, each layer's in order.
void check_flow(Source& random, const DispatchView& d) {
  const int64_t target = random.size(1, 20);
  Flow flow(d, [&](int64_t) { return target; });
  std::vector<int64_t> next(d.layers, 0);
  int64_t before = 0;
  while (const Piece* piece = flow.take()) {
    EXPECT(piece->layer >= before && piece->layer < d.layers && piece->first < piece->last);
    EXPECT(piece->first == next[piece->layer] && piece->last <= d.counts[2 * piece->layer]);
    const int32_t* offsets = d.cu_seqlens + piece->layer * (d.samples + 1);
    EXPECT(offsets[piece->last] - offsets[piece->first] <= flow.rows());
    if (!flow.regroups()) EXPECT(flow.is_ready(*piece));
    next[piece->layer] = piece->last;
    before = piece->layer;
    flow.finish(*piece);
  }
  for (int64_t l = 0; l < d.layers; ++l) {
    const int32_t* offsets = d.cu_seqlens + l * (d.samples + 1);
    EXPECT(offsets[next[l]] == d.counts[2 * l + 1]);
  }
}

void dispatches(Source& random) {
  const int64_t layers = random.size(0, 3), capacity = random.size(0, 24), samples = random.size(0, 6);
  Guarded<int32_t> rows(random, layers * capacity), cu_seqlens(random, layers * (samples + 1)),
      counts(random, layers * 2);
  for (int64_t l = 0; l < layers; ++l) {
    int32_t* row = rows.data() + l * capacity;
    for (int64_t r = 0; r < capacity; ++r) row[r] = static_cast<int32_t>(r);
    if (random.one_in(2)) std::shuffle(row, row + capacity, random);
    int32_t* offset = cu_seqlens.data() + l * (samples + 1);
    const int64_t sequences = random.between(0, samples),
                  active = sequences == 0 ? 0 : random.between(0, capacity);
    for (int64_t s = 0; s <= samples; ++s) offset[s] = static_cast<int32_t>(random.between(0, active));
    std::sort(offset, offset + samples + 1);
    offset[0] = 0;
    std::fill(offset + sequences, offset + samples + 1, static_cast<int32_t>(active));
    std::fill(row + active, row + capacity, -1);
    counts[2 * l] = static_cast<int32_t>(sequences), counts[2 * l + 1] = static_cast<int32_t>(active);
  }
  const int64_t breaks = random.one_in(2) ? 0 : random.between(1, 3);
  for (int64_t b = 0; b < breaks; ++b) {
    Guarded<int32_t>& where = random.one_in(3) ? counts : random.one_in(2) ? cu_seqlens : rows;
    if (where.size() == 0) continue;
    int32_t& number = where[random.between(0, where.size() - 1)];
    number = static_cast<int32_t>(random.one_in(2) ? random.edge() : number + random.between(-2, 2));
  }
  const DispatchView view = {rows.data(), cu_seqlens.data(), counts.data(), layers, capacity, samples};
  std::string problem;
  const int64_t most = check_dispatch(view, problem);
  EXPECT(most == most_of_valid(view) && problem.empty() == (most >= 0));
  EXPECT(breaks > 0 || most >= 0);
  if (most >= 0) check_flow(random, view);
}

int64_t bytes_of(WeightType type, int64_t hidden, int64_t intermediate) {
  return type == WeightType::int8 ? ReducedLayout(hidden, intermediate).bytes
                                  : PackedLayout(type, hidden, intermediate).bytes();
}

// Headers and sizes of any kind; the weights behind them are never looked at.
void blobs(Source& random) {
  const int64_t hidden = random.size(1, 9), intermediate = random.size(1, 9);
  const auto type = static_cast<WeightType>(random.between(0, 2));
  PackedHeader header = packed_header(type, hidden, intermediate);
  int64_t width = hidden, bytes = bytes_of(type, hidden, intermediate);
  const int64_t breaks = random.one_in(3) ? 0 : random.between(1, 3);
  for (int64_t b = 0; b < breaks; ++b) {
    switch (random.between(0, 5)) {
      case 0:
        header.hidden_size = random.edge();
        break;
      case 1:
        header.intermediate_size = random.one_in(2) ? random.edge() : random.size(0, bytes);
        break;
      case 2:
        width = random.one_in(2) ? header.hidden_size : random.edge();
        break;
      case 3:
        header.type = static_cast<WeightType>(random.one_in(2) ? random.edge() : random.between(0, 3));
        break;
      case 4:
        reinterpret_cast<unsigned char*>(&header)[random.between(0, 63)] = static_cast<unsigned char>(random());
        break;
      default:
        bytes = random.one_in(2) ? random.size(0, 80) : std::max<int64_t>(0, bytes + random.between(-3, 3));
    }
  }
  Guarded<unsigned char> blob(random, std::min<int64_t>(bytes, sizeof(header)), breaks > 0 ? 1 : 8);
  std::memcpy(blob.data(), &header, blob.size());
  std::string problem;
  const auto shape = check_packed(blob.data(), bytes, width, problem);
  EXPECT(problem.empty() == shape.has_value());
  EXPECT(shape || breaks > 0);
  if (!shape) return;
  EXPECT(width > 0 && shape->intermediate_size > 0 && width <= bytes && shape->intermediate_size <= bytes);
  EXPECT(bytes_of(shape->type, width, shape->intermediate_size) == bytes);
}

}  // namespace

void fuzz_checks(Source& random) {
  random.one_in(2) ? dispatches(random) : blobs(random);
}

}  // namespace dynplan::fuzz
