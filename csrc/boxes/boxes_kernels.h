// SPDX-License-Identifier: Apache-2.0
// Launchers of the box kernels: contiguous device pointers, no torch. `stream` is a cudaStream_t.
// Instantiated for float and double; n * m is below 2^31.
#pragma once

namespace detr_fast {

template <typename scalar_t>
void launch_generalized_box_iou(const scalar_t* boxes1,  // (n, 4)
                                const scalar_t* boxes2,  // (m, 4)
                                int n, int m,
                                scalar_t* out,  // (n, m)
                                void* stream);

template <typename scalar_t>
void launch_generalized_box_iou_backward(const scalar_t* grad,    // (n, m)
                                         const scalar_t* boxes1,  // (n, 4)
                                         const scalar_t* boxes2,  // (m, 4)
                                         int n, int m,
                                         scalar_t* grad_boxes1,  // (n, 4)
                                         void* stream);

}  // namespace detr_fast
