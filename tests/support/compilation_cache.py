"""The cache of compiled programs that the whole suite shares: pytest's workers, the programs that
tests start, and the next run.
"""

import importlib.metadata
import os
import pathlib
import shutil

# TEST_CACHE names a folder that clones share; `make clean` removes the clone's own.
ROOT = pathlib.Path(
    os.environ.get("TEST_CACHE") or pathlib.Path(__file__).resolve().parents[2] / ".pytest_cache"
)
FOLDER = ROOT / f"compiled-jax-{importlib.metadata.version('jax')}"
_RUNNING = FOLDER / "running"  # is there until a run has ended
LIMIT = 2 << 30  # bytes


def begin() -> None:
    """Prepares the cache for a run.

    It is emptied once it exceeds its limit: entries of older code are never used again. What a run
    that was killed left incomplete is removed.
    """
    if FOLDER.is_dir() and sum(path.stat().st_size for path in FOLDER.iterdir()) > LIMIT:
        shutil.rmtree(FOLDER)
    if _RUNNING.exists():
        remove_incomplete(since=_RUNNING.stat().st_mtime)
    FOLDER.mkdir(parents=True, exist_ok=True)
    _RUNNING.touch()


def end(since: float) -> None:
    """Leaves the cache to the next run."""
    remove_incomplete(since)
    _RUNNING.unlink(missing_ok=True)


def remove_incomplete(since: float) -> None:
    """Removes entries written after `since`, in seconds of the epoch, that do not decompress: some
    tests kill programs, perhaps while they write one.
    """
    from jax._src.compilation_cache import decompress_executable

    for path in FOLDER.glob("*-cache"):
        if path.stat().st_mtime >= since:
            try:
                decompress_executable(path.read_bytes())
            except Exception:
                path.unlink()
