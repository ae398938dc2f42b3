#!/usr/bin/env bash
# bash test.sh [--all] [pytest arguments]: makes .venv if need be and runs the tests; --all adds the slow ones.
# Tests that need a GPU run where there is one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
# shellcheck source=venv.sh
source "$root/venv.sh"

marks='not slow'
if [ "${1:-}" = --all ]; then
    marks=''
    shift
fi
if ! has_gpu; then
    marks="${marks:+$marks and }not gpu"
fi
make_venv dev
export OMP_NUM_THREADS=1    # two test processes share the cores
exec "$python" -m pytest -q -n 2 -m "$marks" "$@"
