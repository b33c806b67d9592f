"""Runs a script in launch/."""

import pathlib
import subprocess

import train

ROOT = pathlib.Path(train.__file__).parent
LAUNCH = ROOT / "launch"


def run(script: str, *arguments, env, status=0):
    done = subprocess.run(
        [LAUNCH / script, *arguments], env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done
