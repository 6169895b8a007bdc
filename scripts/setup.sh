#!/usr/bin/env bash
# Creates the virtual environment .venv with everything the project needs. Running it again does no harm.
#
#   bash scripts/setup.sh                                          # the newest PaddlePaddle
#   VENV=.venv-2.6.2 PADDLE_VERSION=2.6.2 bash scripts/setup.sh    # another folder, another version
#   PYTHON=python3.12 bash scripts/setup.sh                        # another interpreter than python3
#   CUDA=11.8 bash scripts/setup.sh                                # a GPU build (11.8, 12.6, 12.9), or CUDA=cpu
#   PADDLE_INDEX=https://... bash scripts/setup.sh                 # a mirror of Paddle's index, the folder of cu126/
#
# scripts/choose_paddle.py chooses the build. GPU builds of Paddle 3 come from Paddle's index, all other packages from
# PyPI or the index of pip's settings.
#
# Exit code 3: this version of PaddlePaddle has no build for this Python or these GPUs. 1: any other failure.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
venv=${VENV:-.venv}
python=${PYTHON:-python3}
incomplete=$venv/.setup-incomplete              # exists from the first change to the last one

fail() {
    echo "setup: $1" >&2
    exit "${2:-1}"
}

version_of() {                                  # version_of PYTHON: major.minor, or nothing if it does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

version=$(version_of "$python")
case $version in
'') fail "$python does not run: install Python 3.9 to 3.13, or name an interpreter with PYTHON=" ;;
2.* | 3.[0-8]) fail "$python is Python $version, but the project needs 3.9 to 3.13: name another one with PYTHON=" ;;
esac

base=$("$python" -c 'import sys; print(sys._base_executable)')

if [ -e "$incomplete" ]; then
    echo "setup: $venv is incomplete because an earlier setup was interrupted: it is created again"
    rm -rf "$venv"
fi
choice=$("$base" scripts/choose_paddle.py "$venv") || exit
IFS='|' read -r paddle index replaced alternative <<<"$choice"

created=
remedy="name another folder with VENV=, or delete this one"
if [ -e "$venv" ]; then
    found=$(version_of "$venv/bin/python")
    [ -n "$found" ] || fail "$venv exists, but is not a working virtual environment: $remedy"
    [ "$found" = "$version" ] ||
        fail "$venv has Python $found, but $python is Python $version: set PYTHON=$venv/bin/python, $remedy"
    "$venv/bin/python" -c 'import pip' 2>/dev/null || fail "$venv has no pip: $remedy"
else
    created=yes
    mkdir -p "$venv"
    touch "$incomplete"
    # PYTHON may be the interpreter of the environment that has just been deleted: its base creates the new one.
    "$base" -m venv "$venv" || {
        rm -rf "$venv"
        fail "$python cannot create a virtual environment: on Debian and Ubuntu, apt install python3-venv"
    }
fi

requirements=$(mktemp)
messages=$(mktemp)
downloads=$venv/.setup-downloads
trap 'rm -rf "$requirements" "$messages" "$downloads"' EXIT

pip() {
    "$venv/bin/python" -m pip "$@" 2>"$messages"
}

satisfied() {                                   # satisfied REQUIREMENT...: without an index pip fails if one is missing
    PIP_CONFIG_FILE=/dev/null pip --isolated install --no-index "$@" >/dev/null
}

complete() {
    sed "s/^paddlepaddle>=.*/$paddle/" requirements.txt >"$requirements"
    [ -z "$created$changed" ] && satisfied -r "$requirements"
}

no_match() {
    grep -q "^ERROR: No matching distribution" "$messages"
}

fail_pip() {                                    # after pip has failed
    local available
    if no_match && [ -z "$changed" ]; then      # the environment is unchanged
        rm -f "$incomplete"
        [ -z "$created" ] || rm -rf "$venv"
        # Without a connection pip finds no version of any package, which does not mean that there is no wheel.
        if grep -q "distribution found for paddlepaddle" "$messages" && ! grep -q "connection broken" "$messages"; then
            available=$(sed -n 's/.*(from versions: \(.*\))$/; available: \1/p' "$messages")
            fail "no wheel of $paddle for Python $version on this platform$available" 3
        fi
    fi
    cat "$messages" >&2
    fail "pip could not install the packages: see its messages above, then run setup again"
}

fallback=
changed=
if [ -n "$replaced" ] || { [ -n "$index" ] && ! satisfied --no-deps "$paddle"; }; then
    # The wheel is downloaded before anything changes: the environment stays usable if that fails. Paddle's index is the
    # only one here, because pip ignores an unreachable additional index and could take PyPI's build for another CUDA.
    echo "setup: downloading $paddle${index:+ from $index}"
    rm -rf "$downloads"
    if pip download --quiet --retries 2 --no-deps --dest "$downloads" ${index:+--index-url "$index"} "$paddle"; then
        touch "$incomplete"
        changed=yes
        # Both packages own the folder paddle: one that is removed after the other is installed takes its files along.
        [ -z "$replaced" ] || pip uninstall --quiet --yes "$replaced" || fail_pip
        replaced=
        pip install --quiet --no-index --no-deps --find-links "$downloads" "$paddle" || fail_pip
    elif [ -n "$index" ] && [ "$replaced" != paddlepaddle-gpu ] && no_match &&
        grep -Eq "connection broken|from versions: none" "$messages"; then
        if grep -q "connection broken" "$messages"; then
            fallback="$index cannot be reached: run setup again when it can be$alternative"
        else
            fallback="$index has no $paddle for Python $version on $(uname -m): run setup again later$alternative"
        fi
        paddle=paddlepaddle${PADDLE_VERSION:+==$PADDLE_VERSION}
        index=
        replaced=
    else
        fail_pip
    fi
fi
if ! complete; then
    touch "$incomplete"
    # Paddle's index has all packages that its GPU build needs; most of them are on PyPI and its mirrors too.
    pip install --quiet -r "$requirements" ${index:+--extra-index-url "$index"} || fail_pip
    cat "$messages" >&2
fi
result=$("$venv/bin/python" -W ignore -c '
import platform, sys, paddle
cuda = paddle.version.cuda()
print("setup: Paddle", paddle.__version__, "for CUDA " + cuda if cuda[:1].isdigit() else "for the CPU",
      "on Python", platform.python_version(), "in", sys.argv[1])' "$venv") ||
    fail "Paddle is installed in $venv, but cannot be imported: see the messages above; $remedy"
rm -f "$incomplete"
[ -z "$fallback" ] || echo "setup: the CPU build of Paddle is installed, because $fallback"
echo "$result"
