"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping

from internvl3_jax.io.terminal import printable

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
LONGEST = 2000  # characters of a message


class ApiError(Exception):
    """A request that is refused, or that fails.

    Args:
      message: what is wrong and what to do.
      status: of HTTP.
      param: the field that is wrong.
      code: a name for programs, such as "model_not_found".
      headers: further ones of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """Returns the JSON object of the response."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        message = printable(self.message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 3]}..."
        return {
            "error": {
                "message": message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }


def server_error() -> ApiError:
    """Returns the error of a bug; the log has the details."""
    return ApiError(
        "the server failed at this request; its log says why", 500, code="internal_error"
    )


def busy(message: str, seconds: int = 1) -> ApiError:
    """Returns the error of a full server."""
    return ApiError(message, 429, code="overloaded", headers={"Retry-After": str(seconds)})
