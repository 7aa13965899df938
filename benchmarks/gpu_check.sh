#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All the evidence of a machine with a GPU, in one command and without a network:
#   bash benchmarks/gpu_check.sh [part ...] [--device cpu] [--quick]      see gpu_check.py --help
# Exit status: 0 all parts are fine, 1 one failed, 2 there is no GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[[ -x $(command -v "$python") ]] || python=python3
exec "$python" "$here/gpu_check.py" "$@"
