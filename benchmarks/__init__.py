# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: equal outputs first, then time against the peers. See README.md."""
