# SPDX-License-Identifier: Apache-2.0
"""Breaks the box kernels in every place, by rule, and sees that the checks notice."""
