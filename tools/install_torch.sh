#!/bin/sh
# install_torch.sh PYTHON VERSION CONSTRAINTS INDEX: install a CPU build of PyTorch.
# PyPI's build for Linux on x86-64 needs several GB of CUDA libraries, so it is the last resort. First come the sources that pip is
# set up with, if they have a build marked "+cpu" (a mirror or a folder of wheels), then INDEX.

if [ $# -ne 4 ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || [ "$1" = -h ]
    exit
fi

pip_install() {
    "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile "$@"
}

python=$1
pip_install --constraint "$3" "torch==$2+cpu" 2>/dev/null ||
    pip_install --no-deps --index-url "$4" "torch==$2" 2>/dev/null ||
    { echo "No CPU build of PyTorch $2 found: installing PyPI's." >&2; pip_install --constraint "$3" "torch==$2"; }
