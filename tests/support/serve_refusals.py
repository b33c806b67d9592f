"""Bodies that the server must refuse: (name, body, status, what the message says, the field)."""

import base64
import io
import json
import zlib

from PIL import Image

from tests.support.live_server import data_url, user
from tests.support.tiny_checkpoint import make_image

HI = user("Hi")
IMAGE = data_url(make_image(16, 16))


def chat(**fields) -> dict:
    return {"messages": HI} | fields


def shown(url, **more) -> dict:
    part = {"type": "image_url", "image_url": {"url": url} | more}
    return {"messages": user([{"type": "text", "text": "What is this?"}, part])}


def part(**fields) -> dict:
    return {"messages": user([fields])}


def in_base64(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its pixels do not have."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


WHOLE = Image.new("RGB", (64, 64), "red")
_buffer = io.BytesIO()
WHOLE.save(_buffer, "JPEG")
JPEG = _buffer.getvalue()

NO_JSON = [
    ("empty", b"", 400, "is not JSON", None),
    ("spaces", b"   ", 400, "is not JSON", None),
    ("half", b'{"messages": [', 400, "is not JSON", None),
    ("text", b"hello", 400, "is not JSON", None),
    ("comma at the end", b'{"messages": [],}', 400, "is not JSON", None),
    ("single quotes", b"{'messages': []}", 400, "is not JSON", None),
    ("a list", b"[]", 400, "send a JSON object", None),
    ("a number", b"7", 400, "send a JSON object", None),
    ("null", b"null", 400, "send a JSON object", None),
    ("a text", b'"messages"', 400, "send a JSON object", None),
    ("two objects", b"{}{}", 400, "is not JSON", None),
    ("a key twice", b'{"n": 1, "n": 2}', 400, "occurs twice", None),
    ("NaN", b'{"temperature": NaN}', 400, "not a JSON number", None),
    ("infinity", b'{"temperature": Infinity}', 400, "not a JSON number", None),
    ("huge exponent", b'{"temperature": 1e999}', 400, "too large", None),
    ("long number", b'{"seed": ' + b"9" * 5000 + b"}", 400, "digits", None),
    ("deep lists", b"[" * 100_000, 400, "nested", None),
    ("deep objects", b'{"a":' * 100_000, 400, "nested", None),
    ("Latin-1", '{"user": "é"}'.encode("latin-1"), 400, "not UTF-8", None),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), 400, "UTF-16", None),
    ("binary", bytes(range(256)), 400, "", None),
    ("null byte", b'{"messages": "\0"}', 400, "", None),
    ("control character", b'{"user": "\x01"}', 400, "is not JSON", None),
]

MESSAGES = [
    ("no messages", {}, 400, "messages is missing", "messages"),
    ("misspelled", {"mesages": HI}, 400, "did you mean 'mesages'", "messages"),
    ("null messages", {"messages": None}, 400, "messages is missing", "messages"),
    ("text as messages", {"messages": "Hi"}, 400, "expected a list", "messages"),
    ("object as messages", {"messages": {}}, 400, "expected a list", "messages"),
    ("no message", {"messages": []}, 400, "at least one", "messages"),
    ("many messages", {"messages": HI * 1000}, 400, "--max_messages", "messages"),
    ("text as message", {"messages": ["Hi"]}, 400, "expected an object", "messages[0]"),
    ("null as message", {"messages": [None]}, 400, "expected an object", "messages[0]"),
    ("no role", {"messages": [{"content": "Hi"}]}, 400, "role is missing", "messages[0].role"),
    ("number as role", {"messages": [{"role": 1, "content": "Hi"}]}, 400, "a text", None),
    ("bad role", {"messages": [{"role": "bot", "content": "Hi"}]}, 400, "'bot'", None),
    ("tool", {"messages": [{"role": "tool", "content": "x"}]}, 400, "not supported", None),
    ("no content", {"messages": [{"role": "user"}]}, 400, "content is missing", None),
    ("number as content", {"messages": user(3)}, 400, "a text or a list", None),
    ("object as content", {"messages": user({"text": "x"})}, 400, "a text or a list", None),
    ("no part", {"messages": user([])}, 400, "at least one part", "messages[0].content"),
    ("text as part", {"messages": user(["Hi"])}, 400, "expected an object", None),
    ("unknown key", {"messages": [HI[0] | {"contents": "x"}]}, 400, "did you mean", None),
    (
        "tool calls",
        {"messages": [*HI, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        400,
        "supports only",
        "messages[1].tool_calls",
    ),
    ("answer last", {"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "last", None),
    ("assistant first", {"messages": [{"role": "assistant", "content": "x"}, *HI]}, 400, "", None),
    ("two of the user", {"messages": HI * 2}, 400, "take turns", None),
    ("system alone", {"messages": [{"role": "system", "content": "x"}]}, 400, "no user", None),
    (
        "system behind",
        {"messages": [*HI, {"role": "system", "content": "x"}]},
        400,
        "only the first",
        None,
    ),
    ("half a surrogate", b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, "", None),
    ("too long", {"messages": user("word " * 5000)}, 400, "context", "messages"),
]

PARTS = [
    ("no type", part(text="x"), 400, "type is missing", "messages[0].content[0].type"),
    ("unknown type", part(type="picture"), 400, "expected text, image_url", None),
    ("text without text", part(type="text"), 400, "text is missing", None),
    ("number as text", part(type="text", text=1), 400, "a text", None),
    ("text with more", part(type="text", text="x", url="y"), 400, "is not a field", None),
    ("audio", part(type="input_audio", input_audio={}), 400, "no audio", None),
    ("of responses", part(type="input_image", image_url="x"), 400, "image_url", None),
    ("image without", part(type="image_url"), 400, "image_url is missing", None),
    ("image as number", part(type="image_url", image_url=1), 400, "", None),
    ("image without url", part(type="image_url", image_url={}), 400, "url is missing", None),
    ("empty url", shown(""), 400, "expected at least 1", None),
    ("null url", shown(None), 400, "url is missing", None),
    ("misspelled detail", shown(IMAGE, detial="low"), 400, "did you mean 'detail'", None),
    ("unknown detail", shown(IMAGE, detail="lowest"), 400, "did you mean 'low'", None),
    ("both limits", shown(IMAGE, max_tiles=1, max_dynamic_patch=1), 400, "mean the same", None),
    ("low and tiles", shown(IMAGE, detail="low", max_tiles=3), 400, "one tile", None),
    ("no tile", shown(IMAGE, max_tiles=0), 400, "from 1", None),
    ("many tiles", shown(IMAGE, max_tiles=10**9), 400, "from 1", None),
    (
        "image of the system",
        {
            "messages": [
                {"role": "system", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]},
                *HI,
            ]
        },
        400,
        "only the user's",
        None,
    ),
    (
        "fewer tags",
        {
            "messages": user(
                [
                    *shown(IMAGE)["messages"][0]["content"],
                    *shown(IMAGE)["messages"][0]["content"],
                    {"type": "text", "text": "<image>"},
                ]
            )
        },
        400,
        "tags",
        None,
    ),  # fmt: skip
    (
        "many images",
        {"messages": user([{"type": "image_url", "image_url": {"url": "x"}}] * 1000)},
        400,
        "--max_images",
        "messages",
    ),
]

URLS = [
    ("no scheme", shown("cat.png"), 403, "--allow_files", None),
    ("absolute path", shown("/etc/passwd"), 403, "--allow_files", None),
    ("file address", shown("file:///etc/passwd"), 403, "--allow_files", None),
    ("file of a host", shown("file://evil/etc/passwd"), 403, "", None),
    ("climbing", shown("../../../../etc/passwd"), 403, "--allow_files", None),
    ("climbing, encoded", shown("file:///%2e%2e/%2e%2e/etc/passwd"), 403, "", None),
    ("null in a path", shown("a\0b"), 403, "", None),
    ("device", shown("/dev/zero"), 403, "--allow_files", None),
    ("http", shown("http://example.com/a.png"), 403, "--allow_hosts", None),
    ("https", shown("https://example.com/a.png"), 403, "--allow_hosts", None),
    ("metadata", shown("http://169.254.169.254/latest"), 403, "--allow_hosts", None),
    ("this machine", shown("http://127.0.0.1:22/"), 403, "--allow_hosts", None),
    ("bad port", shown("http://a:99999999/"), 400, "is not an address", None),
    ("ftp", shown("ftp://example.com/a.png"), 400, "begins with 'ftp'", None),
    ("gs", shown("gs://bucket/a.png"), 400, "begins with 'gs'", None),
    ("s3", shown("s3://bucket/a.png"), 400, "begins with 's3'", None),
    ("javascript", shown("javascript:alert(1)"), 400, "begins with", None),
    ("base64 alone", shown(IMAGE.split(",")[1] * 20), 400, "without its beginning", None),
    ("data without", shown("data:"), 400, "is not a data URL", None),
    ("data without base64", shown("data:image/png,xyz"), 400, "without base64", None),
    ("data of text", shown(in_base64(b"x", "text/html")), 400, "such as image/png", None),
    ("wrong base64", shown("data:image/png;base64,@@@@"), 400, "not base64", None),
    ("cut base64", shown("data:image/png;base64,abcde"), 400, "not base64", None),
    ("empty base64", shown("data:image/png;base64,"), 400, "empty file", None),
    ("letters of no alphabet", shown("data:image/png;base64,éé"), 400, "not base64", None),
    ("no image", shown(in_base64(b"hello")), 400, "not an image", None),
    ("a web page", shown(in_base64(b"<!DOCTYPE html>")), 400, "web page", None),
    ("SVG", shown(in_base64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 400, "", None),
    ("EPS", shown(in_base64(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 400, "", None),
    ("PDF as an image", shown(in_base64(b"%PDF-1.7\n")), 400, "", None),
    ("a cut JPEG", shown(in_base64(JPEG[: len(JPEG) // 2])), 400, "", None),
    ("a huge PNG", shown(in_base64(png(100_000, 100_000))), 400, "pixels", None),
    ("a PNG without width", shown(in_base64(png(0, 7))), 400, "", None),
    ("a PNG without data", shown(in_base64(png(500, 500))), 400, "", None),
]

VALUES = [
    ("unknown field", chat(temprature=1), 400, "did you mean 'temperature'", "temprature"),
    ("field of completions", chat(prompt="Hi"), 400, "is not a field", "prompt"),
    ("long field", chat(**{"x" * 5000: 1}), 400, "is not a field", None),
    ("model as number", chat(model=1), 400, "a text", "model"),
    ("unknown model", chat(model="gpt-4o"), 404, "there is no model", "model"),
    ("misspelled model", chat(model="tinny"), 404, "did you mean 'tiny'", "model"),
    ("temperature as text", chat(temperature="1"), 400, "a number", "temperature"),
    ("temperature as bool", chat(temperature=True), 400, "a number", "temperature"),
    ("negative temperature", chat(temperature=-1), 400, "0 (greedy)", "temperature"),
    ("top_p of zero", chat(top_p=0), 400, "above 0", "top_p"),
    ("top_p above one", chat(top_p=1.5), 400, "at most 1", "top_p"),
    ("top_k below", chat(top_k=-2), 400, "top_k", "top_k"),
    ("top_k as float", chat(top_k=1.5), 400, "whole number", "top_k"),
    ("top_k too large", chat(top_k=2**40), 400, "top_k", "top_k"),
    ("min_p", chat(min_p=2), 400, "min_p", "min_p"),
    ("repetition", chat(repetition_penalty=0), 400, "above 0", "repetition_penalty"),
    ("presence", chat(presence_penalty=3), 400, "from -2 to 2", "presence_penalty"),
    ("frequency", chat(frequency_penalty=-3), 400, "from -2 to 2", "frequency_penalty"),
    ("seed as text", chat(seed="1"), 400, "whole number", "seed"),
    ("seed too large", chat(seed=2**70), 400, "seed", "seed"),
    ("n of zero", chat(n=0), 400, "from 1", "n"),
    ("many answers", chat(n=1000), 400, "from 1 to 16", "n"),
    ("n as float", chat(n=1.0), 400, "whole number", "n"),
    ("no tokens", chat(max_tokens=0), 400, "from 1", "max_tokens"),
    ("negative tokens", chat(max_completion_tokens=-5), 400, "from 1", "max_completion_tokens"),
    ("tokens as text", chat(max_tokens="many"), 400, "whole number", "max_tokens"),
    ("two limits", chat(max_tokens=1, max_completion_tokens=2), 400, "mean the same", None),
    ("more than fits", chat(max_tokens=100_000), 400, "context", "messages"),
    ("stop as number", chat(stop=1), 400, "a text or a list", "stop"),
    ("empty stop", chat(stop=""), 400, "1 to", "stop"),
    ("number in stop", chat(stop=["a", 1]), 400, "stop[1]", "stop"),
    ("many stops", chat(stop=["a"] * 100), 400, "at most", "stop"),
    ("long stop", chat(stop="a" * 10_000), 400, "1 to", "stop"),
    ("stop ids", chat(stop_token_ids=[10**9]), 400, "token ids", "stop_token_ids"),
    ("many stop ids", chat(stop_token_ids=list(range(100))), 400, "at most", "stop_token_ids"),
    ("stream as text", chat(stream="yes"), 400, "true or false", "stream"),
    ("options without", chat(stream_options={"include_usage": True}), 400, "stream: true", None),
    ("stream options", chat(stream=True, stream_options={"usage": True}), 400, "", None),
    ("stream options as list", chat(stream=True, stream_options=[]), 400, "an object", None),
    ("logprobs as number", chat(logprobs=5), 400, "true or false", "logprobs"),
    ("top without", chat(top_logprobs=3), 400, "needs logprobs", "top_logprobs"),
    ("many logprobs", chat(logprobs=True, top_logprobs=21), 400, "from 0 to 20", None),
    ("bias as list", chat(logit_bias=[1]), 400, "an object", "logit_bias"),
    ("bias of a word", chat(logit_bias={"cat": 1}), 400, "token ids", "logit_bias"),
    ("bias of no id", chat(logit_bias={"99999999": 1}), 400, "token ids", "logit_bias"),
    ("bias below", chat(logit_bias={"-1": 1}), 400, "token ids", "logit_bias"),
    ("bias too large", chat(logit_bias={"1": 101}), 400, "-100 to 100", "logit_bias"),
    ("bias as text", chat(logit_bias={"1": "x"}), 400, "a number", "logit_bias"),
    ("thinking as text", chat(thinking="yes"), 400, "true or false", "thinking"),
    (
        "thinking twice",
        chat(thinking=True, chat_template_kwargs={"enable_thinking": False}),
        400,
        "give one",
        None,
    ),  # fmt: skip
    ("template", chat(chat_template_kwargs={"enable_thiking": True}), 400, "did you mean", None),
    ("own template", chat(chat_template="{{ x }}"), 400, "leave it out", "chat_template"),
    ("delta", chat(delta="1/3"), 400, "delta", "delta"),
    ("delta of zero", chat(delta=0), 400, "delta", "delta"),
    ("deltas", chat(delta=["1/4", "1/2"]), 400, "2 deltas for 0 images", "delta"),
    ("no deltas", chat(delta=[]), 400, "delta", "delta"),
    ("max_tiles", chat(max_tiles=0), 400, "from 1", "max_tiles"),
    ("tile rule", chat(tiles="shard"), 400, "shared", "tiles"),
    ("tools", chat(tools=[{"type": "function"}]), 400, "supports only", "tools"),
    ("tool choice", chat(tool_choice="required"), 400, "supports only", "tool_choice"),
    ("audio out", chat(modalities=["text", "audio"]), 400, "supports only", "modalities"),
    ("best_of", chat(best_of=4, temperature=1), 400, "--critic DIR", "best_of"),
    ("greedy best_of", chat(best_of=4), 400, "a temperature above 0", "best_of"),
    ("best_of below n", chat(best_of=2, n=3), 400, "must not be less", "best_of"),
    ("streamed best_of", chat(best_of=2, stream=True), 400, "leave out stream", "best_of"),
    ("best_of as text", chat(best_of="2"), 400, "best_of", "best_of"),
    ("many answers", chat(best_of=10_000, temperature=1), 400, "best_of", "best_of"),
    ("beam search", chat(use_beam_search=True), 400, "supports only False", "use_beam_search"),
    ("prefill", chat(continue_final_message=True), 400, "", "continue_final_message"),
]

GRAMMARS = [
    ("format as text", chat(response_format="json"), 400, "an object", "response_format"),
    ("unknown format", chat(response_format={"type": "xml"}), 400, "json_object", None),
    ("no type", chat(response_format={}), 400, "type is missing", None),
    ("no schema", chat(response_format={"type": "json_schema"}), 400, "missing", None),
    (
        "schema without",
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        400,
        "schema is missing",
        None,
    ),
    (
        "schema of a type",
        chat(guided_json={"type": "objekt"}),
        400,
        "guided_json cannot be used",
        "guided_json",
    ),
    ("schema as text", chat(guided_json="{"), 400, "guided_json cannot be used", "guided_json"),
    ("remote schema", chat(guided_json={"$ref": "http://a/b"}), 400, "cannot be used", None),
    ("long schema", chat(guided_json={"enum": ["x" * 100_000]}), 400, "characters", None),
    ("regex", chat(guided_regex="("), 400, "unclosed", "guided_regex"),
    ("look-ahead", chat(guided_regex="(?=a)b"), 400, "look-around", "guided_regex"),
    ("long regex", chat(guided_regex="a" * 100_000), 400, "from 1 to", "guided_regex"),
    ("no choice", chat(guided_choice=[]), 400, "from 1 to", "guided_choice"),
    ("number as choice", chat(guided_choice=[1]), 400, "guided_choice[0]", "guided_choice"),
    ("lark", chat(guided_grammar="start: nothing"), 400, "cannot be used", "guided_grammar"),
    ("two", chat(guided_regex="a", guided_choice=["b"]), 400, "only one", "guided_choice"),
    ("structured", chat(structured_outputs={"regexp": "a"}), 400, "did you mean 'regex'", None),
    ("with thinking", chat(thinking=True, guided_regex="a"), 400, "do not go together", None),
]

ALL = [*NO_JSON, *MESSAGES, *PARTS, *URLS, *VALUES, *GRAMMARS]


def as_bytes(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()
