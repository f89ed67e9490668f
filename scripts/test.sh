#!/usr/bin/env bash
# Format, lint, types and tests, in an environment of the exact versions of constraints.txt.
#
#   scripts/test.sh [pytest arguments]          everything but the tests marked slow
#   scripts/test.sh --slow [pytest arguments]   the tests marked slow, alone
#
# Makes .venv where it is absent, and installs into it again where constraints.txt or pyproject.toml changed. PYTHON
# names the interpreter it is made with (default: python3). Where pip finds its packages is pip's own configuration:
# with a CPU build of torch within its reach no CUDA libraries are downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

slow=0
if [[ "${1:-}" == --slow ]]; then
    slow=1
    shift
fi

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "test.sh: $python is not Python 3.11 or newer; name one with PYTHON=... bash scripts/test.sh" >&2
    exit 1
fi

venv="$PWD/.venv"
stamp="$venv/installed.sha256"
# The place belongs to it because an editable install points to it.
wanted="$({ pwd; "$python" --version; cat pyproject.toml constraints.txt; } | sha256sum)"
if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
    rm -f "$stamp"
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv"
    torch="$(grep '^torch==' constraints.txt)"
    # Alone and first: the largest download by far, and nothing else has a say in which build of it comes.
    "$venv/bin/python" -m pip install -c constraints.txt "$torch"
    "$venv/bin/python" -m pip install -c constraints.txt -e '.[dev,docs,gguf,saelens,sparsify,tensorboard]'
    echo "$wanted" >"$stamp"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

# Nothing in the tests may depend on the network, or on what the last one left on the Hub.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
# Tests start several ranks at once, and forked workers: one thread each, whatever the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # No GPU: triton's kernels run in its interpreter.
    export TRITON_INTERPRET=1
fi

if ((slow)); then
    status=0
    # As below; but what needs the quickstart, which is trained once, belongs together whatever its file.
    python -m pytest -m slow --numprocesses "${TEST_PROCESSES:-2}" --dist loadgroup --no-loadscope-reorder "$@" ||
        status=$?
    # 5: nothing was collected. Of the whole suite that means that no test is marked slow; of a selection, a mistake.
    if ((status == 5 && $# == 0)); then
        echo "test.sh: no test is marked slow"
        exit 0
    fi
    exit "$status"
fi

# pyright looks up whether a newer release exists, unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
ruff format --check .
ruff check .
pyright --pythonpath "$venv/bin/python"
# Files in parallel: each has its own fixtures. Ranks and threads of a test are few (above). In their order, by which the
# long ones of tests/distributed come early: xdist would begin with the files of most tests, and end with those alone.
python -m pytest -m "not slow" --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
