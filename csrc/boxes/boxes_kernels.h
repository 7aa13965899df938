// SPDX-License-Identifier: Apache-2.0
// Launchers of the box kernels: device pointers, no torch. Boxes are contiguous and aligned to 16
// bytes; `stream` is a cudaStream_t. Instantiated for float and double, and for Hull::kNone (IoU)
// and Hull::kClamped (generalized IoU). All counts and products of counts are below 2^31.
#pragma once

#include "boxes/box_math.h"

namespace detr_fast {

template <Hull kHull, typename scalar_t>
void launch_pairwise_iou(const scalar_t* boxes1,  // (problems, n, 4)
                         const scalar_t* boxes2,  // (problems, m, 4)
                         int problems, int n, int m,
                         scalar_t* out,  // (problems, n, m)
                         void* stream);

// The gradient of boxes1: sums over the columns.
template <Hull kHull, typename scalar_t>
void launch_pairwise_iou_backward_rows(const scalar_t* grad,  // (problems, n, m), any strides
                                       PairwiseSteps step,
                                       const scalar_t* boxes1,  // (problems, n, 4)
                                       const scalar_t* boxes2,  // (problems, m, 4)
                                       int problems, int n, int m,
                                       scalar_t* grad_boxes1,  // (problems, n, 4)
                                       void* stream);

// Pieces that n rows are cut into for the gradient of boxes2, at least 1.
int pairwise_iou_splits(int n);

// The gradient of boxes2: sums over the rows of each piece, then over the pieces.
template <Hull kHull, typename scalar_t>
void launch_pairwise_iou_backward_columns(const scalar_t* grad,  // (problems, n, m), any strides
                                          PairwiseSteps step,
                                          const scalar_t* boxes1,  // (problems, n, 4)
                                          const scalar_t* boxes2,  // (problems, m, 4)
                                          int problems, int n, int m,
                                          scalar_t* partial,      // (problems, splits, m, 4)
                                          scalar_t* grad_boxes2,  // (problems, m, 4)
                                          void* stream);

template <typename scalar_t>
void launch_generalized_box_iou_loss(const scalar_t* boxes1,  // (count, 4)
                                     const scalar_t* boxes2,  // (count, 4)
                                     scalar_t eps, int count,
                                     scalar_t* out,  // (count)
                                     void* stream);

// A gradient that is not needed is nullptr.
template <typename scalar_t>
void launch_generalized_box_iou_loss_backward(const scalar_t* grad, long long step,  // (count)
                                              const scalar_t* boxes1,                // (count, 4)
                                              const scalar_t* boxes2,                // (count, 4)
                                              scalar_t eps, int count,
                                              scalar_t* grad_boxes1,  // (count, 4)
                                              scalar_t* grad_boxes2,  // (count, 4)
                                              void* stream);

template <typename scalar_t>
void launch_matched_box_losses(const scalar_t* src,  // (count, 4)
                               const scalar_t* tgt,  // (count, 4)
                               int count,
                               scalar_t* l1,         // (count)
                               scalar_t* giou_loss,  // (count)
                               void* stream);

// A gradient that is not needed is nullptr.
template <typename scalar_t>
void launch_matched_box_losses_backward(const scalar_t* grad_l1, long long step_l1,      // (count)
                                        const scalar_t* grad_giou, long long step_giou,  // (count)
                                        const scalar_t* src,  // (count, 4)
                                        const scalar_t* tgt,  // (count, 4)
                                        int count,
                                        scalar_t* grad_src,  // (count, 4)
                                        scalar_t* grad_tgt,  // (count, 4)
                                        void* stream);

}  // namespace detr_fast
