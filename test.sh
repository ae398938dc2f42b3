#!/usr/bin/env bash
# bash test.sh [--all | --oldest] [pytest arguments]: makes .venv if need be and runs the tests; --all adds the slow ones.
# --oldest makes .venv-oldest with the oldest torch that pyproject.toml promises, and runs there, slow ones too, the
# tests of what depends on it: torch.compile, contraction plans, attention windows and fused kernels.
# Tests that need a GPU run where there is one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
# shellcheck source=venv.sh
source "$root/venv.sh"

marks='not slow'
files=()
case ${1:-} in
    --all)
        marks=''
        shift ;;
    --oldest)
        marks=''
        files=(tests/training/test_compile.py tests/kron/test_plan.py tests/attention/test_window.py tests/kron/test_fused.py)
        use_venv .venv-oldest "$(oldest_torch)"
        shift ;;
esac
if ! has_gpu; then
    marks="${marks:+$marks and }not gpu"
fi
make_venv dev
export OMP_NUM_THREADS=1    # two test processes share the cores
exec "$python" -m pytest -q -n 2 -m "$marks" ${files[@]+"${files[@]}"} "$@"
