"""Reads what an answer must match: response_format of OpenAI, and the names of vLLM."""

import dataclasses
import json

from internvl3_jax.io.terminal import excerpt
from internvl3_jax.serve.body import Fields
from internvl3_jax.serve.errors import ApiError

LONGEST = 1 << 16  # characters of a schema, expression or grammar
MAX_CHOICES = 1024


@dataclasses.dataclass(frozen=True)
class GrammarText:
    """The grammar that an answer must match, as it was written.

    Attributes:
      kind: "json" (a schema), "regex", "choice" or "grammar" (Lark, as llguidance reads it).
      text: of the schema, expression or grammar; a JSON list of the choices.
      field: where it stands in the body.
    """

    kind: str
    text: str
    field: str


def read_grammar(fields: Fields) -> GrammarText | None:
    """Returns the one that is given, if any.

    Raises:
      ApiError: more than one is given, or one is wrong.
    """
    found = [_read_response_format(fields), *_read_guided(fields, "guided_")]
    structured = fields.object("structured_outputs")
    if structured is not None:
        found += _read_guided(structured, "")
        structured.finish(
            ("disable_fallback", "disable_any_whitespace", "disable_additional_properties"),
            {"whitespace_pattern": (), "structural_tag": ()},
        )
    found = [grammar for grammar in found if grammar is not None]
    if len(found) > 1:
        raise ApiError(
            f"{found[0].field} and {found[1].field} are both given; an answer can match only one",
            param=found[1].field,
        )
    return found[0] if found else None


def _read_response_format(fields: Fields) -> GrammarText | None:
    form = fields.object("response_format")
    if form is None:
        return None
    kind = form.get("type", str, choices=("text", "json_object", "json_schema"))
    grammar = None
    if kind == "json_object":
        grammar = GrammarText("json", '{"type": "object"}', fields.name("response_format"))
    elif kind == "json_schema":
        outer = form.object("json_schema")
        if outer is None:
            raise ApiError(
                "response_format.json_schema is missing; give its name and schema",
                param="response_format",
            )
        outer.get("name", str, None)
        outer.get("description", str, None)
        outer.get("strict", bool, None)
        grammar = _schema(outer, "schema")
        if grammar is None:
            raise ApiError(f"{outer.name('schema')} is missing", param=outer.name("schema"))
        outer.finish()
    form.finish()
    return grammar


def _read_guided(fields: Fields, prefix: str) -> list[GrammarText | None]:
    found = [_schema(fields, f"{prefix}json")]
    for kind in ("regex", "grammar"):
        text = fields.get(f"{prefix}{kind}", str, None, low=1, high=LONGEST)
        name = fields.name(f"{prefix}{kind}")
        found.append(None if text is None else GrammarText(kind, text, name))
    if fields.get(f"{prefix}json_object", bool, False):
        found.append(GrammarText("json", '{"type": "object"}', fields.name(f"{prefix}json_object")))
    choices = fields.get(f"{prefix}choice", list, None, low=1, high=MAX_CHOICES)
    if choices is not None:
        name = fields.name(f"{prefix}choice")
        for index, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice:
                raise ApiError(f"{name}[{index}] is {excerpt(choice)}; expected a text", param=name)
        found.append(_checked(GrammarText("choice", json.dumps(choices), name)))
    return found


def _schema(fields: Fields, field: str) -> GrammarText | None:
    value = fields.get(field, (dict, str), None)
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return _checked(GrammarText("json", text, fields.name(field)))


def _checked(grammar: GrammarText) -> GrammarText:
    if len(grammar.text) > LONGEST:
        raise ApiError(
            f"{grammar.field} has {len(grammar.text):,} characters; at most {LONGEST:,} are taken",
            param=grammar.field,
        )
    return grammar
