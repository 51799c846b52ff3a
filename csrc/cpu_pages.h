// The pages of fresh results.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace clp {

// Has the system make the pages of a contiguous result that will be written from end to end, huge ones where it may,
// before the first write. A gradient of a weight is fresh at every step, and from 32 MiB on glibc maps such memory
// anew each time: touched page by page, that of [2048, 2, 2048] float32 costs 9 ms of the 26 that its product and all
// its writes take (two Xeon threads of a virtual machine), made like this 4. Smaller ones meet that where a step's
// freed gradients were given back together. Where all pages are there it costs 8 us a MiB at most.
//
// Below 8 MiB it does nothing: the advice stays with the place, in the allocator's heap too. Linux before 5.14 only
// takes the advice of huge pages, other systems nothing.
void make_pages(const torch::stable::Tensor& result);

}  // namespace clp
