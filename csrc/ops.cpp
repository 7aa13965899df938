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
  // GIoU of every pair of boxes: (N, 4), (M, 4) -> (N, M)
  m.def("generalized_box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
  // Gradient of boxes1: (N, M), (N, 4), (M, 4) -> (N, 4)
  m.def("generalized_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2) -> Tensor");
}
