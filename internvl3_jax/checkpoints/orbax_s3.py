"""Adds s3:// addresses to Orbax.

Orbax reads and writes gs:// through TensorStore's gcs driver and supports no other object storage.
TensorStore also has an s3 driver, so the four functions of Orbax that distinguish gs:// from local
paths are replaced. They are private; `install` raises if a version does not have them.
"""

import functools
import os

from internvl3_jax.io.file_errors import FileError

_SCHEMES = ("gs://", "s3://")


@functools.cache
def install() -> None:
    """Replaces the functions, once per process; FileError if this Orbax has different ones."""
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        is_gcs_path, kvstore = gcs_utils.is_gcs_path, gcs_utils.get_kvstore_for_gcs
        uses_driver, normalize = (
            tensorstore_utils._use_gcs_driver,
            tensorstore_utils._normalize_path,
        )
    except (ImportError, AttributeError) as error:
        raise FileError(
            f"s3:// checkpoints need another version of orbax-checkpoint ({error}); install the "
            "one in requirements/"
        ) from error
    gcs_utils.is_gcs_path = lambda path: str(path).startswith(_SCHEMES) or is_gcs_path(path)
    gcs_utils.get_kvstore_for_gcs = lambda path: (
        _s3(str(path)) if str(path).startswith("s3://") else kvstore(path)
    )
    tensorstore_utils._use_gcs_driver = lambda directory: (
        directory.startswith(_SCHEMES) or uses_driver(directory)
    )
    tensorstore_utils._normalize_path = lambda path: _whole_scheme(normalize(path))


def _whole_scheme(path: str) -> str:
    return (
        f"s3://{path.removeprefix('s3:/')}"
        if path.startswith("s3:/") and not path.startswith("s3://")
        else path
    )


def _s3(path: str) -> dict:
    """Returns TensorStore's spec of an s3:// address; AWS variables give endpoint and region."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return (
        spec
        | ({"endpoint": endpoint} if endpoint else {})
        | ({"aws_region": region} if region else {})
    )
