#!/bin/sh
# Without an argument: the supported Python versions that this machine can use, newest first ("3.13 3.12 3.11").
# With a version: the path of that Python. PATH is searched first, then pyenv's folder.
# Usable means that it starts and can make virtual environments: pyenv's shims may refuse to start, and Debian ships Python without venv.

find_python() {
    for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        "$candidate" - "$1" 2>/dev/null <<'PROBE' && return
import ensurepip, sys, venv
if "%d.%d" % sys.version_info[:2] != sys.argv[1]:
    sys.exit(1)
print(sys.executable)
PROBE
    done
    return 1
}

case $1 in
-*)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || [ "$1" = -h ]
    exit
    ;;
esac
if [ -n "$1" ]; then
    find_python "$1" || { echo "No usable Python $1 found." >&2; exit 1; }
else
    for version in 3.13 3.12 3.11; do
        find_python "$version" >/dev/null && echo "$version"
    done
fi
