# SPDX-License-Identifier: Apache-2.0
"""The training and evaluation loops and what they report."""
