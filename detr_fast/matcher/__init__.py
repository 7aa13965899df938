# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching of queries and targets.

`HungarianMatcher` is that of facebookresearch/detr.  Each module of this package has the
matcher of another code base under its own name; `patch` puts it into an installed library.
"""

from detr_fast.matcher.detr import HungarianMatcher, build_matcher
from detr_fast.matcher.patching import Patch, patch

__all__ = ["HungarianMatcher", "Patch", "build_matcher", "patch"]
