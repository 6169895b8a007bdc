#!/usr/bin/env bash
# Makes the virtual environment .venv with everything the project needs. Can be run again at no harm.
#
#   bash scripts/setup.sh                                      # the newest PaddlePaddle
#   VENV=.venv-2.6 PADDLE_VERSION=2.6.2 bash scripts/setup.sh  # another environment, another version
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}

package=paddlepaddle
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    package=paddlepaddle-gpu
fi

if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "setup: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
sed "s/^paddlepaddle>=.*/$package${PADDLE_VERSION:+==$PADDLE_VERSION}/" requirements.txt >"$requirements"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
"$venv/bin/python" -W ignore -c 'import paddle; print("setup: Paddle", paddle.__version__, "in '"$venv"'")'
