# SPDX-License-Identifier: Apache-2.0
"""An HTML page of one or several runs: curves, AP, confused classes, and the worst images."""
