#include "mixed_linear_cpu_blocks.h"

#include <algorithm>
#include <utility>

namespace clp {

namespace {

// Rows that are worked on together, and mixes. Floats of the mixes' panels of inputs, and panels of each, at most;
// twice, for those of the next pass.
constexpr int64_t kBlockRows = 512, kMixes = 8, kMixFloats = 1 << 17, kPanels = 8;

// All lines in the course of `tiles` products of `steps` terms, some every 16 terms or fewer.
void spread(Fetch& fetch, int64_t tiles, int64_t steps) {
  fetch.at_once = ceil_div(fetch.num_rows * fetch.lines, std::max<int64_t>(tiles * ceil_div(steps, 16), 1));
}

}  // namespace

int64_t even_blocks(int64_t size, int64_t most, int64_t unit) {
  return size == 0 ? unit : ceil_div(ceil_div(size, ceil_div(size, most)), unit) * unit;
}

RowBlocks::RowBlocks(const std::vector<Segment>& segments, int64_t panel) {
  for (size_t g = 0; g < segments.size(); g++) {
    const Segment& segment = segments[g];
    const int64_t step = even_blocks(segment.end - segment.begin, kBlockRows, panel);
    for (int64_t m0 = segment.begin; m0 < segment.end; m0 += step) {
      const int64_t end = std::min(segment.end, m0 + step), size = ceil_div(end - m0, panel) * panel;
      if (blocks.empty() || blocks.back().count == kMixes || blocks.back().places + size > kBlockRows) {
        blocks.push_back({pieces.size(), 0, places, 0});
      }
      pieces.push_back({m0, end, places, g});
      blocks.back().count++;
      blocks.back().places += size;
      places += size;
    }
  }
}

int64_t RowBlocks::most_places() const {
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.places);
  return most;
}

BlockMixes::BlockMixes(const Weights& weights, const RowBlocks& rows, const Block& block, std::vector<const Mix*> mixes,
                       int64_t terms)
    : w_(weights),
      rows_(rows),
      block_(block),
      mixes_(std::move(mixes)),
      terms_(terms),
      num_terms_(static_cast<int64_t>(mixes_.size() / block.count)),
      count_(static_cast<int64_t>(block.count)),
      kernels_(kernels_in_use()) {}

int64_t BlockMixes::outputs_scratch(int64_t terms, size_t pieces) {
  return kernels_in_use().group * terms * std::min<int64_t>(kMixes, pieces);
}

int64_t BlockMixes::inputs_scratch(int64_t terms, size_t pieces, int64_t D) {
  const int64_t width = kernels_in_use().panel_rows, columns = std::min(kPanels, ceil_div(D, width)) * width;
  const int64_t each = width * terms * std::min<int64_t>(kMixes, pieces);
  return 2 * std::max(each, std::min(kMixFloats, columns / width * each));
}

bool BlockMixes::list_same_copies(int64_t t) const {
  const Mix& first = *mixes_of(t)[0];
  return std::all_of(mixes_of(t), mixes_of(t) + count_, [&](const Mix* mix) {
    return mix->count == first.count && std::equal(mix->copies, mix->copies + mix->count, first.copies);
  });
}

void BlockMixes::by_outputs(
    int64_t n0, int64_t n1, float* scratch, const std::function<void(const Slice&)>& begin,
    const std::function<void(const Piece&, const Slice&, const float*, Fetch&)>& product) const {
  const int64_t group = kernels_.group, mix_step = group * terms_;
  const Mix& first = *mixes_of(0)[0];
  const bool same = list_same_copies(0);
  std::vector<const char*> next;
  for (int64_t d0 = 0; d0 < w_.D || d0 == 0; d0 += terms_) {
    const int64_t d1 = std::min(w_.D, d0 + terms_), size = d1 - d0;
    begin({0, n0, n1, d0, d1});
    for (int64_t n = n0; n < n1; n += group) {
      const int64_t end = std::min(n1, n + group);
      kernels_.mix_blocks({w_, mixes_of(0), count_, same, n, end, d0, d1, size, false, scratch, mix_step, 0, size});
      Fetch fetch = end < n1 ? lines(next, first, end, std::min(n1, end + group), d0, d1)
                             : lines(next, first, n0, std::min(n1, n0 + group), d1, std::min(w_.D, d1 + terms_));
      spread(fetch, block_.places / kernels_.panel_rows, size);
      for (int64_t s = 0; s < count_; s++) {
        product(rows_.pieces[block_.first + s], {0, n, end, d0, d1}, scratch + s * mix_step, fetch);
      }
    }
  }
}

std::vector<Slice> BlockMixes::list_passes(int64_t d0, int64_t d1) const {
  const int64_t width = kernels_.panel_rows, floats = width * terms_ * count_;
  const int64_t inputs = even_blocks(d1 - d0, std::clamp<int64_t>(kMixFloats / floats, 1, kPanels) * width, width);
  std::vector<Slice> passes;
  for (int64_t t = 0; t < num_terms_; t++) {
    for (int64_t n = 0; n < w_.N || n == 0; n += terms_) {
      for (int64_t d = d0; d < d1; d += inputs) {
        passes.push_back({t, n, std::min(w_.N, n + terms_), d, std::min(d1, d + inputs)});
      }
    }
  }
  return passes;
}

// Outputs [begin, end) of a pass, into its panels.
void BlockMixes::mix(const Slice& pass, int64_t begin, int64_t end, float* panels) const {
  const int64_t width = kernels_.panel_rows, panel = width * (pass.n1 - pass.n0);
  const int64_t step = ceil_div(pass.d1 - pass.d0, width) * panel;
  kernels_.mix_blocks({w_, mixes_of(pass.t), count_, list_same_copies(pass.t), begin, end, pass.d0, pass.d1, width,
                       true, panels + (begin - pass.n0) * width, step, panel, width});
}

// The next pass's panels are mixed a few outputs at a time between the products of this one, which fetch them: all at
// once they are more than the second-level cache holds of rows a power of two apart.
void BlockMixes::by_inputs(
    int64_t d0, int64_t d1, int64_t group, int64_t panel, float* scratch,
    const std::function<void(const Slice&)>& begin,
    const std::function<void(const Piece&, int64_t, int64_t, const Slice&, const float*, Fetch&)>& product) const {
  const std::vector<Slice> passes = list_passes(d0, d1);
  const int64_t width = kernels_.panel_rows, half = inputs_scratch(terms_, block_.count, w_.D) / 2;
  const auto rows_from = [&](const Piece& piece, int64_t m) {
    return std::min({group, piece.rows() - m, panel - m % panel});
  };
  int64_t groups = 0;
  for (int64_t s = 0; s < count_; s++) {
    const Piece& piece = rows_.pieces[block_.first + s];
    for (int64_t m = 0; m < piece.rows(); m += rows_from(piece, m)) groups++;
  }
  mix(passes[0], passes[0].n0, passes[0].n1, scratch);
  std::vector<const char*> rows;
  for (size_t i = 0; i < passes.size(); i++) {
    const Slice& pass = passes[i];
    const Slice next = i + 1 < passes.size() ? passes[i + 1] : Slice{};
    if (pass.d0 == d0) begin(pass);
    const int64_t size = pass.n1 - pass.n0, panels = ceil_div(pass.d1 - pass.d0, width);
    const int64_t at_once = ceil_div(next.n1 - next.n0, groups);
    const float* mixed = scratch + i % 2 * half;
    int64_t n = next.n0;
    for (int64_t s = 0; s < count_; s++) {
      const Piece& piece = rows_.pieces[block_.first + s];
      for (int64_t m = 0; m < piece.rows(); m += rows_from(piece, m)) {
        const int64_t end = std::min(next.n1, n + at_once);
        Fetch fetch = lines(rows, *mixes_of(next.t)[s], n, end, next.d0, next.d1);
        spread(fetch, panels, size);
        product(piece, m, rows_from(piece, m), pass, mixed + s * panels * width * size, fetch);
        if (n < end) mix(next, n, end, scratch + (i + 1) % 2 * half);
        n = end;
      }
    }
  }
}

// The lines of a block of the streams that `mix` reads.
Fetch BlockMixes::lines(std::vector<const char*>& rows, const Mix& mix, int64_t n0, int64_t n1, int64_t d0,
                        int64_t d1) const {
  rows.clear();
  if (n0 >= n1 || d0 >= d1) return {nullptr, 0, 0, 1, 0};
  const int64_t base_size = w_.base_dtype == Dtype::f32 ? 4 : 2, delta_size = w_.deltas_dtype == Dtype::f32 ? 4 : 2;
  for (int64_t n = n0; n < n1; n++) {
    if (mix.base) rows.push_back(static_cast<const char*>(w_.base) + (n * w_.D + d0) * base_size);
    for (int64_t a = 0; a < mix.count; a++) {
      const int64_t first = (n * w_.K + mix.copies[a]) * w_.D + d0;
      rows.push_back(static_cast<const char*>(w_.deltas) + first * delta_size);
    }
  }
  const int64_t bytes = (d1 - d0) * (mix.count ? delta_size : base_size);
  return {rows.data(), static_cast<int64_t>(rows.size()), 0, ceil_div(bytes, kLine), 0};
}

void write_row(const Kernels& kernels, GradTile tile, int64_t columns) {
  tile.columns = tile.out_row = kernels.panel_rows;
  tile.rows = columns / tile.columns;
  kernels.grad(tile);
  if (columns % tile.columns == 0) return;
  tile.g += tile.rows * tile.g_step;
  tile.first_out += tile.rows * tile.columns;
  tile.columns = columns % tile.columns;
  tile.rows = 1;
  kernels.grad(tile);
}

}  // namespace clp
