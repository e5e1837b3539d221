import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from casallm.data import tokenizer as module
from casallm.data.tokenizer import (
    NAMED,
    SPECIAL_TOKENS,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
    named_tokenizer,
    train_tokenizer,
)
from casallm.errors import DataError

TEXT = st.text(st.characters(codec="utf-8")) | st.text(st.sampled_from(" \n\t'aAsS1.é北😀<|>bos"))
TEXT |= st.lists(st.sampled_from((*SPECIAL_TOKENS, "a ", " b"))).map("".join)
SPELLED = "".join(SPECIAL_TOKENS) + "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    loaded = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded.encode_special_tokens = True  # as ordinary text, which is what ours always does
    return loaded


@given(text=TEXT)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXT)
def test_the_tokenizers_library_gives_the_same_ids(tokenizer, hugging_face, text):
    assert hugging_face.encode(text).ids == tokenizer.encode(text)


def test_both_libraries_agree_on_every_document(tokenizer, hugging_face, texts):
    encoded = [encoding.ids for encoding in hugging_face.encode_batch(texts)]

    assert encoded == tokenizer.encode_batch(texts)


@given(texts=st.lists(TEXT | st.just("\x00<|document|>\x00") | st.just("\ud800x")))
def test_documents_joined_are_encoded_as_documents_alone(tokenizer, texts):
    joined = tokenizer.encode_documents(texts)

    assert joined.dtype == np.uint32
    alone = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert joined.tolist() == [id_ for ids in alone for id_ in ids]
    assert tokenizer.encode_documents(texts, threads=2).tolist() == joined.tolist()


WORDS = st.lists(
    st.sampled_from(["a", "Word's", "naïve", "  ", " ", "12", "\n", "é", "北", "don't"])
)


@given(texts=st.lists(WORDS.map(" ".join), min_size=1, max_size=1), size=st.integers(0, 9))
def test_a_large_document_is_encoded_in_parts_as_in_one(tokenizer, texts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LARGE_CHARS", size)
        ids = tokenizer.encode_documents(texts).tolist()

    assert ids == [tokenizer.bos_id, *tokenizer.encode(texts[0])]


def test_special_tokens_come_last_and_never_from_text(tokenizer):
    ids = tokenizer.encode(SPELLED)

    assert tokenizer.vocab_size == 400
    assert list(tokenizer.special_ids.values()) == [394, 395, 396, 397, 398, 399]
    assert list(tokenizer.special_ids) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_id, tokenizer.system_id, tokenizer.user_id) == (394, 395, 396)
    assert (tokenizer.assistant_id, tokenizer.end_id, tokenizer.pad_id) == (397, 398, 399)
    assert max(ids) < 394
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.end_id]) == SPELLED


@given(ids=st.lists(st.integers(0, 399)))
def test_any_ids_decode_though_they_may_be_no_whole_characters(tokenizer, ids):
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


def test_a_character_cut_in_two_decodes_to_a_replacement(tokenizer):
    ids = [rank for byte in "é".encode() for rank in [tokenizer.ranks[bytes([byte])]]]

    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@given(text=TEXT)
def test_bytes_of_tokens_add_up_to_the_text(tokenizer, text):
    n_bytes = tokenizer.token_bytes()

    assert n_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert n_bytes[list(tokenizer.special_ids.values())].sum() == 0
    assert len(n_bytes) == tokenizer.vocab_size


@pytest.mark.parametrize("spaces", [" " * 300_000 + "x", "\n \t" * 100_000, "a" + " " * 300_000])
def test_endless_white_space_is_encoded(tokenizer, spaces):
    assert tokenizer.decode(tokenizer.encode(spaces)) == spaces
    assert tokenizer.decode(tokenizer.encode_documents(["a", spaces]).tolist()) == "a" + spaces


def test_a_lone_surrogate_becomes_a_replacement(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_what_is_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)

    loaded = load_tokenizer(tmp_path)

    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.name == "bpe-400"
    assert loaded.special_ids == tokenizer.special_ids
    assert build_tokenizer(TokenizerConfig(name=str(tmp_path))).fingerprint == loaded.fingerprint


def test_training_is_the_same_in_every_process(tokenizer, tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'tests/data'); from conftest import make_texts;"
        "from casallm.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(make_texts(400), 400).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}

    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )

    assert answer.stdout.strip() == tokenizer.fingerprint


def test_another_text_gives_another_fingerprint(tokenizer, texts):
    assert train_tokenizer(texts[:300], 390).fingerprint != tokenizer.fingerprint


def test_too_little_text_for_the_vocabulary_is_one_sentence():
    with pytest.raises(DataError) as caught:
        train_tokenizer(["hello hello"], 4096)

    assert str(caught.value) == (
        "there is too little text for a vocabulary of 4,096: it has words for 267; ask for 267 or"
        " fewer, or add text"
    )


def test_a_vocabulary_needs_room_for_all_bytes():
    with pytest.raises(
        DataError, match="100 is too small: 256 bytes and 6 special tokens need 262"
    ):
        train_tokenizer(["hello"], 100)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"added_tokens": []}', b"\xff"])
def test_a_broken_tokenizer_file_is_one_sentence(tokenizer, tmp_path, content):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)

    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer that casallm wrote"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer in .* \(tokenizer.json is missing\)"):
        load_tokenizer(tmp_path)


def test_an_unknown_vocabulary_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="named 'gpt-2', did you mean gpt2"):
        named_tokenizer("gpt-2")


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("gpt2", 50_263), pytest.param("cl100k", 100_283, marks=pytest.mark.slow)],
)
def test_a_named_vocabulary_encodes_as_tiktoken_does(
    tiktoken_cache, tmp_path, texts, name, vocab_size
):
    tokenizer = named_tokenizer(name)
    samples = [*texts[:50], SPELLED, "  \n\n x'S  12345 \r\n"]

    tokenizer.save(tmp_path / "saved")

    assert tokenizer.vocab_size == vocab_size
    expected = tiktoken.get_encoding(NAMED[name][0])
    assert tokenizer.encode_batch(samples) == [expected.encode_ordinary(text) for text in samples]
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert other.encode(samples[0]).ids == tokenizer.encode(samples[0])
    assert other.token_to_id("<|pad|>") == tokenizer.pad_id == vocab_size - 1


def fetch_gpt2(cache, proxy, seconds=1.0):
    """What a fresh process says that has neither the file nor a way to it; and how long it took."""
    script = (
        "from casallm.data.tokenizer import named_tokenizer\n"
        f"try: named_tokenizer('gpt2', seconds={seconds})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(cache), "HTTPS_PROXY": proxy}
    environment |= {"https_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
    started = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip(), time.monotonic() - started


def test_without_a_network_a_named_vocabulary_is_one_sentence(tmp_path):
    said, _ = fetch_gpt2(tmp_path, "http://127.0.0.1:9", seconds=60.0)

    assert said == (
        "DataError the vocabulary gpt2 could not be downloaded (ProxyError): point"
        " TIKTOKEN_CACHE_DIR at a folder that holds it, or use tokenizer.name=trained"
    )


def test_a_server_that_never_answers_does_not_hang(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said, seconds = fetch_gpt2(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert "could not be downloaded (no answer in 1 s)" in said
    assert seconds < 30  # 1 s and the start of the process, on a busy machine
