import json

import pytest

from casallm.data.summary import (
    compare_tokenizers,
    describe_dataset,
    documents_in,
    split_into_tokens,
)
from casallm.data.tokenizer import train_tokenizer


def test_a_data_set_is_described_by_its_numbers_and_its_text(prepared, texts):
    told = json.loads(json.dumps(describe_dataset(prepared.directory)))

    train, val = told["splits"]["train"], told["splits"]["val"]
    assert train["documents"] + val["documents"] == len(texts)
    assert train["bytes_per_token"] == pytest.approx(
        train["bytes_of_text"] / (train["tokens"] - train["documents"])
    )
    lengths = [len(ids) for ids in documents_in(prepared, "val")]
    assert val["document_tokens"]["longest"] == max(lengths)
    assert val["document_tokens"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert len(train["samples"]) == 3
    assert all(any(text.startswith(sample) for text in texts) for sample in train["samples"])
    assert told["tokenizer"]["name"] == "bpe-400"


def test_documents_are_found_across_the_parts_in_which_they_are_looked_for(prepared, monkeypatch):
    expected = [ids.tolist() for ids in documents_in(prepared, "train")]

    monkeypatch.setattr("casallm.data.summary._CHUNK_TOKENS", 13)

    assert [ids.tolist() for ids in documents_in(prepared, "train")] == expected
    assert len(expected) == prepared.splits["train"].documents


def test_a_larger_vocabulary_makes_fewer_tokens_of_the_same_text(texts):
    small, large = train_tokenizer(texts, 300), train_tokenizer(texts, 400)

    first, second = compare_tokenizers(texts, [small, large])

    assert (first.name, first.vocab_size, second.vocab_size) == ("bpe-300", 300, 400)
    assert first.bytes_of_text == second.bytes_of_text == sum(len(t.encode()) for t in texts)
    assert first.tokens == sum(len(small.encode(text)) for text in texts)
    assert second.bytes_per_token > first.bytes_per_token > 1


def test_a_text_is_shown_token_by_token(prepared):
    pieces = split_into_tokens(prepared.tokenizer(), "the model 北")

    assert "".join(text for _, text in pieces).startswith("the model ")
    assert [id_ for id_, _ in pieces] == prepared.tokenizer().encode("the model 北")
