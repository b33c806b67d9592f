"""Reads the body of a request field by field; every error names the field."""

import re
import types
from collections.abc import Iterable, Mapping

from internvl3_jax.io import strict_json
from internvl3_jax.io.strict_json import JsonError, suggestion
from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.errors import ApiError

_REQUIRED = object()
_NOTHING: Mapping[str, tuple] = types.MappingProxyType({})


def parse(data: bytes) -> "Fields":
    """Returns the fields of a JSON object; ApiError if the body is none."""
    try:
        values = strict_json.loads(data, "body")
    except JsonError as error:
        text = str(error).replace("; was it written or downloaded completely?", "")
        raise ApiError(f"{text}; send a JSON object in UTF-8", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(
            f"the body is {strict_json.describe(values)}; send a JSON object", code="invalid_json"
        )
    return Fields(values)


class Fields:
    """The fields of a JSON object, read one by one; `finish` refuses those that were not.

    Args:
      values: of the object.
      path: of the object in the body, such as "messages[0]"; "" for the body itself.
    """

    def __init__(self, values, path: str = ""):
        if not isinstance(values, dict):
            raise ApiError(
                f"{path} is {strict_json.describe(values)}; expected an object", param=path
            )
        self.values, self.path = values, path
        self._object = strict_json.Object(values, path)

    def name(self, field: str) -> str:
        """Returns the path of a field in the body."""
        return f"{self.path}.{field}" if self.path else field

    def get(self, field: str, kind, default=_REQUIRED, **bounds):
        """Returns a value; null counts as absent. kind, bounds: as of `strict_json.Object.get`.

        Raises:
          ApiError: the value is missing or wrong.
        """
        name = self.name(field)
        self._object.asked.add(field)
        value = self.values.get(field)
        if value is None:
            if default is not _REQUIRED:
                return default
            near = suggestion(field, self.values.keys() - {field})
            raise ApiError(f"{name} is missing{near}", param=name, code="missing_field")
        try:
            return strict_json.check(value, kind, name, **bounds)
        except JsonError as error:
            raise ApiError(str(error), param=name) from error

    def object(self, field: str) -> "Fields | None":
        """Returns an object's fields, or None if it is absent."""
        value = self.get(field, dict, None)
        return None if value is None else Fields(value, self.name(field))

    def finish(self, ignored: Iterable[str] = (), neutral: Mapping[str, tuple] = _NOTHING) -> None:
        """Refuses all fields that were not read.

        Args:
          ignored: fields that may have any value.
          neutral: fields that may have only these values, which change nothing.

        Raises:
          ApiError: it names the field, and one that may have been meant.
        """
        known = {*self._object.asked, *ignored, *neutral}
        for field, value in self.values.items():
            name = self.name(field)
            if field not in known:
                near = suggestion(field, known) or "; leave it out"
                where = f" of {self.path}" if self.path else ""
                raise ApiError(
                    f"{excerpt(field)} is not a field{where} that this server knows{near}",
                    param=name[:200],
                    code="unknown_field",
                )
            allowed = (None, *neutral.get(field, ()))
            if field in neutral and not any(
                value == one and type(value) is type(one) for one in allowed
            ):
                only = " or ".join(excerpt(one) for one in neutral[field]) or "null"
                raise ApiError(
                    f"{name} is {excerpt(value)}; this server supports only {only}: leave it out",
                    param=name,
                    code="unsupported_value",
                )


def invalid(error: ValueError, known: Iterable[str], **renamed: str) -> ApiError:
    """Returns a ValueError of the package as a refusal of the field that its message begins with.

    Args:
      known: fields.
      renamed: what the package calls a field -> what the request calls it.
    """
    text = str(error)
    first = re.match(r"\w+", text)
    word = first[0] if first else ""
    if word in renamed:
        text, word = renamed[word] + text[len(word) :], renamed[word]
    return ApiError(text, param=word if word in set(known) else None)
