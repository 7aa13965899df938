// SPDX-License-Identifier: Apache-2.0
// Every op of detr_fast: the table of contents. Contracts stand in <subject>/<subject>.h.
#include <Python.h>

#include "common/library.h"

// Lets `import detr_fast._C` load this library; `_C.build` says what was built and why.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) PyModule_AddStringConstant(module, "build", DETR_FAST_BUILD);
  return module;
}

// a FRAGMENT, because STABLE_TORCH_LIBRARY of torch 2.10 does not expand its argument
STABLE_TORCH_LIBRARY_FRAGMENT(DETR_FAST_NAMESPACE, m) {
  // IoU and generalized IoU of every pair of boxes: (..., N, 4), (..., M, 4) -> (..., N, M)
  m.def("box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
  m.def("generalized_box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
  // Gradients of boxes1 and boxes2 from (..., N, M); (0,) where not needed
  m.def(
      "box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, bool needs1, bool needs2) -> "
      "(Tensor, Tensor)");
  m.def(
      "generalized_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, bool needs1, "
      "bool needs2) -> (Tensor, Tensor)");
  // 1 - GIoU of matched pairs: (..., 4), (..., 4) -> (...)
  m.def("generalized_box_iou_loss(Tensor boxes1, Tensor boxes2, float eps) -> Tensor");
  // Gradients of boxes1 and boxes2 from (...); (0,) where not needed
  m.def(
      "generalized_box_iou_loss_backward(Tensor grad, Tensor boxes1, Tensor boxes2, float eps, "
      "bool needs1, bool needs2) -> (Tensor, Tensor)");
  // L1 and 1 - GIoU of matched pairs, centre and size: (..., 4), (..., 4) -> (...), (...)
  m.def("matched_box_losses(Tensor src, Tensor tgt) -> (Tensor l1, Tensor giou_loss)");
  // Gradients of src and tgt from (...), (...); (0,) where not needed
  m.def(
      "matched_box_losses_backward(Tensor grad_l1, Tensor grad_giou, Tensor src, Tensor tgt, "
      "bool needs_src, bool needs_tgt) -> (Tensor, Tensor)");
  // Exact assignment: cost (P, Q, T), count (P,) or T -> query of each target (P, T), status (P,)
  m.def(
      "linear_sum_assignment(Tensor cost, Tensor? count, int algorithm, bool scipy_ties, "
      "int non_finite, float[] replacement) -> (Tensor query_of_target, Tensor status)");
  // Cost and assignment of L layers (B, Q, C), (B, Q, 4) and B images in one launch
  m.def(
      "hungarian_match(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor target_boxes, "
      "Tensor count, Tensor[] extra_cost, float[] weights, int class_cost, "
      "float[] class_options, int groups, int repeat, bool scipy_ties, int non_finite, "
      "float[] replacement) -> (Tensor query_of_target, Tensor target_of_query, Tensor cost, "
      "Tensor status)");
  // All losses of L layers (B, Q, C), (B, Q, 4) that are matched; what the gradient needs
  m.def(
      "set_loss(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor target_boxes, "
      "Tensor count, Tensor target_of_query, Tensor? status, Tensor? class_weight, "
      "Tensor? num_boxes, int class_loss, float alpha, float gamma) -> (Tensor losses, "
      "Tensor softmax, Tensor divisor)");
  // Gradients of logits and boxes from (L, 5); no tensors where not needed
  m.def(
      "set_loss_backward(Tensor grad, Tensor[] logits, Tensor[] boxes, Tensor labels, "
      "Tensor target_boxes, Tensor count, Tensor target_of_query, Tensor? class_weight, "
      "Tensor softmax, Tensor divisor, int class_loss, float alpha, float gamma, "
      "bool needs_logits, bool needs_boxes) -> (Tensor[] grad_logits, Tensor[] grad_boxes)");
  // Attention of (B, H, L, D) heads whose padded rows are skipped: out (B, L, H, D), logarithm of
  // the sum of exponentials (B, H, L), bits of the weights that dropout has kept
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? query_rect, Tensor? key_rect, "
      "Tensor? key_count, SymInt padded_width, int kept, Tensor? seed) -> (Tensor out, Tensor lse, "
      "Tensor keep)");
  // Gradients of q, k, v: one (B, L, 3, H, D) where all have L rows, else three (B, L, H, D)
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor keep, Tensor? query_rect, Tensor? key_rect, Tensor? key_count, SymInt padded_width, "
      "int kept) -> Tensor[]");
  // Bytes (B, 3, H, W) to normalised pixels (B, H, W, 3), 0 outside of sizes (B, 2)
  m.def(
      "normalize_images(Tensor images, Tensor? sizes, float[] mean, float[] std, "
      "ScalarType dtype) -> Tensor");
  // Writes x * 256 / kept where a random byte is below kept, else 0; CPU alone
  m.def("dropout_bytes(Tensor x, Tensor random, int kept, Tensor(a!) out) -> ()");
}
