// Arguments of any rank: what an operator's call checks and makes before its kernel sees rows.
//
// A call runs for every conditioned layer of every decoded token, so it costs microseconds or it shows: no views, no
// call of an operator by its name, and what does not fit raises without saying which argument, which Python then finds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

namespace clp {

using torch::stable::Tensor;

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes);

// Whether x is [..., D] and c either [S, width], beside a row map of x's leading sizes, or [..., width], whose leading
// sizes are the first of x's.
bool rows_fit(const Tensor& x, int64_t D, const Tensor& c, int64_t width, const std::optional<Tensor>& row_map);

// Rows of x [..., D].
int64_t rows_of(const Tensor& x);

// The row map, contiguous; without one, that of c's rows, each of which serves as many of the M rows in turn.
Tensor row_map_of(const std::optional<Tensor>& row_map, int64_t M, const Tensor& c);

// The same without one, into M places: a tensor costs a small call a quarter of a microsecond.
void fill_row_map(const Tensor& c, int64_t M, int32_t* out);

// A tensor like x [..., D] of N columns, contiguous, not initialised.
Tensor empty_rows(const Tensor& x, int64_t N);

// Contiguous, on the CPU, not initialised. Made by the shim: torch::stable::empty looks its operator up by name.
Tensor empty_tensor(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype);

}  // namespace clp
