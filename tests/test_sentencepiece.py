"""tokenizer.py and chat.py on sentencepiece models built like InternLM3's."""

import io
import json
import sys

import numpy as np
import pytest

from internvl3_jax.config import ProcessorConfig
from internvl3_jax.data.text.chat_template import encode_chat
from internvl3_jax.data.text.tokenizer import Tokenizer
from internvl3_jax.data.text.tokenizer_files import TokenizerError
from tests.support.qwen_tokenizer import INTERNVL, random_texts

PIECES = 350  # entries of the models; added tokens follow


def stream_text(tokenizer, ids, skip_special=True):
    stream = tokenizer.stream(skip_special)
    return "".join(piece or "" for piece in map(stream.step, ids)) + stream.flush()


def train_sentencepiece(**options) -> bytes:
    """A small BPE model with byte fallback, built as Llama's and InternLM3's are."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [
                "the cat sat on the mat",
                "system user assistant",
                "你好 世界 书生 万象",
                "what is in the picture",
            ]
            * 20
        ),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        **{"pad_id": -1, **options},
    )
    return model.getvalue()


def internlm_files(model: bytes, **config) -> dict[str, bytes]:
    special = ["<|im_start|>", "<|im_end|>", *INTERNVL]
    entries = {0: "<unk>", 1: "<s>", 2: "</s>"} | {
        PIECES + index: token for index, token in enumerate(special)
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(id): {"content": token, **flags, "special": True} for id, token in entries.items()
    }
    decoder[str(PIECES + 11)] = {"content": "<|plugin|>", **flags, "special": False}
    return {
        "tokenizer.model": model,
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": decoder, **config}).encode(),
    }


def internlm_reference(model: bytes, files: dict[str, bytes]):
    """InternLM3's published tokenizer class on transformers' python backend: cut at added tokens,
    then the model.
    """
    import sentencepiece
    from transformers import AddedToken, PreTrainedTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    class Reference(PreTrainedTokenizer):
        vocab_size = processor.get_piece_size()

        def get_vocab(self):
            return {
                processor.id_to_piece(i): i for i in range(processor.get_piece_size())
            } | self.added_tokens_encoder

        def _tokenize(self, text):
            return processor.encode(text, out_type=str)

        def _convert_token_to_id(self, token):
            return processor.piece_to_id(token)

        def _convert_id_to_token(self, index):
            return processor.id_to_piece(index)

    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    return Reference(
        added_tokens_decoder={int(id): AddedToken(**entry) for id, entry in decoder.items()}
    )


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no_prefix"])
def internlm(request):
    model = train_sentencepiece(add_dummy_prefix=request.param)
    files = internlm_files(model)
    return Tokenizer.from_files(files), internlm_reference(model, files), model


def test_sentencepiece_equals_reference(internlm):
    tokenizer, reference, _ = internlm
    assert tokenizer.vocab_size == PIECES + 12 and tokenizer.bos_id == 1
    assert [tokenizer.token_id(token) for token in ("<s>", "<|im_start|>", "<|plugin|>")] == [
        1,
        PIECES,
        PIECES + 11,
    ]
    texts = random_texts(300, seed=6)
    texts += [
        f"<|im_start|>user\n{text}<img><IMG_CONTEXT></img>\n{text}<|im_end|>\n"
        for text in texts[:100]
    ]
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


def test_sentencepiece_piece_is_the_models_own(internlm):
    import sentencepiece

    tokenizer, _, model = internlm
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in random_texts(100, seed=7):
        if not any(
            token in text for token in ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
        ):
            assert tokenizer.encode(text) == processor.encode(text)
            assert (
                tokenizer.decode(processor.encode(text))
                == processor.decode(processor.encode(text))
                == text
            )


def test_sentencepiece_typed_control_token_stays_text(internlm):
    tokenizer, _, _ = internlm
    for token in (
        "<s>",
        "</s>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
    ):
        ids = tokenizer.encode(f"a {token} b", special=False)
        assert tokenizer.token_id(token) not in ids
        assert tokenizer.decode(ids) == f"a {token} b"
    assert tokenizer.encode("<ref>", special=False) == [tokenizer.token_id("<ref>")]


def test_sentencepiece_decode_and_stream(internlm):
    tokenizer, _, _ = internlm
    ids = tokenizer.encode("<|im_start|>the <ref>cat</ref> 世界<|im_end|>")
    assert tokenizer.decode(ids) == "the <ref>cat</ref> 世界"
    assert (
        tokenizer.decode(ids, skip_special=False) == "<|im_start|>the <ref>cat</ref> 世界<|im_end|>"
    )
    rng = np.random.default_rng(8)
    for text in random_texts(100, seed=8):
        for ids in (tokenizer.encode(text), rng.integers(0, tokenizer.vocab_size, size=30)):
            assert stream_text(tokenizer, ids) == tokenizer.decode(ids)
            assert stream_text(tokenizer, ids, skip_special=False) == tokenizer.decode(
                ids, skip_special=False
            )


def test_sentencepiece_chat_equals_reference(internlm):
    tokenizer, reference, _ = internlm
    for first, second in zip(random_texts(50, seed=10), random_texts(50, seed=11), strict=True):
        messages = [("user", f"{first}<image>{second}"), ("assistant", second)]
        encoded = encode_chat(
            [{"role": role, "content": content} for role, content in messages],
            [1],
            tokenizer,
            ProcessorConfig(tokens_per_tile=2, system_message="the cat"),
            add_generation_prompt=False,
        )
        blocks = [
            f"<|im_start|>{role}\n{content}<|im_end|>\n"
            for role, content in [("system", "the cat"), *messages]
        ]
        blocks[0] = "<s>" + blocks[0]
        blocks[1] = blocks[1].replace("<image>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>")
        ids = [id for block in blocks for id in reference.encode(block, add_special_tokens=False)]
        assert encoded.tokens.tolist() == ids
        answer = reference.encode(blocks[2], add_special_tokens=False)
        header = len(reference.encode("<|im_start|>assistant\n", add_special_tokens=False))
        end = answer.index(tokenizer.token_id("<|im_end|>")) + 1
        assert encoded.tokens[encoded.loss_mask].tolist() == answer[header:end]


def test_sentencepiece_that_knows_a_control_token_itself():
    model = train_sentencepiece(user_defined_symbols=["<|im_end|>", "<img>"])
    files = internlm_files(model)
    ids = {"<|im_end|>": 3, "<img>": 4}  # the model's own
    decoder = {str(id): {"content": token, "special": True} for token, id in ids.items()}
    files["tokenizer_config.json"] = json.dumps(
        {"added_tokens_decoder": decoder, "add_bos_token": False}
    ).encode()
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("the<|im_end|>")[-1] == 3
    assert not {3, 4} & set(tokenizer.encode("the<|im_end|> <img><|im_end|>", special=False))


def test_internlm2_names_pieces_of_its_model_anew():
    """<|im_start|> and <|im_end|> have ids of pieces that the model file calls otherwise, and knows as symbols of their own."""
    model = train_sentencepiece(user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"])
    files = internlm_files(model)
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    decoder = {
        id: entry for id, entry in decoder.items() if not entry["content"].startswith("<|im_")
    }
    names = {3: "<|im_start|>", 4: "<|im_end|>"}
    decoder |= {str(id): {"content": token, "special": True} for id, token in names.items()}
    tokenizer = Tokenizer.from_files(
        files | {"tokenizer_config.json": json.dumps({"added_tokens_decoder": decoder}).encode()}
    )
    assert [tokenizer.token_id(token) for token in names.values()] == [3, 4]
    ids = tokenizer.encode("<|im_start|>user\nthe cat<|im_end|>")
    assert (ids[0], ids[-1]) == (3, 4)
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nthe cat<|im_end|>"
    for typed in (
        "the <|im_end|>",
        "the [UNUSED_TOKEN_2]",
        "[UNUSED_TOKEN_1]user\nthe[UNUSED_TOKEN_2]",
    ):
        ids = tokenizer.encode(typed, special=False)
        assert not {3, 4} & set(ids)
        # a cut costs a space
        assert tokenizer.decode(ids).replace(" ", "") == typed.replace(" ", "")


def test_sentencepiece_package_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"pip install -e '\.\[internlm\]'"):
        Tokenizer.from_files(internlm_files(b""))


def test_llama_style_tokenizer_json_in_a_chat_block(tmp_path):
    """InternLM3's tokenizer converted to tokenizer.json by transformers: bos by template, a space
    only at the very start.
    """
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(add_dummy_prefix=False))
    converted = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    converted.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *INTERNVL]}
    )
    converted.save_pretrained(tmp_path / "converted")
    tokenizer = Tokenizer.from_directory(tmp_path / "converted")
    assert tokenizer.bos_id == converted.bos_token_id == 1
    for text in random_texts(200, seed=9):
        block = f"<|im_start|>user\n{text}<|im_end|>\n"
        expected = converted(block).input_ids
        spliced = [
            tokenizer.token_id("<|im_start|>"),
            *tokenizer.encode(f"user\n{text}", special=False),
        ]
        spliced += [tokenizer.token_id("<|im_end|>"), *tokenizer.encode("\n", special=False)]
        assert [tokenizer.bos_id, *spliced] == expected
        assert tokenizer.encode(block) == spliced
