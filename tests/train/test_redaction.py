from casallm.train.redaction import redacted


def test_values_of_secret_names_are_hidden_at_any_depth():
    settings = {
        "api_key": "abc",
        "log": {"webhook": "https://hooks.test/T0", "every_steps": 10},
        "launch": {"notify": "https://hooks.test/T0", "AWS_SECRET_ACCESS_KEY": "abc"},
    }

    assert redacted(settings) == {
        "api_key": "(hidden)",
        "log": {"webhook": "(hidden)", "every_steps": 10},
        "launch": {"notify": "(hidden)", "AWS_SECRET_ACCESS_KEY": "(hidden)"},
    }


def test_tokens_tokenizers_and_empty_secrets_are_shown():
    settings = {"tokens": 10, "tokenizer": {"name": "trained"}, "n_kv_heads": 2, "api_key": None}

    assert redacted(settings) == settings


def test_users_and_queries_inside_urls_are_hidden_and_the_rest_stands():
    settings = {"source": ["https://me:pass@host.test/a.parquet?sig=abc", "s3://bucket/x", "a?b"]}

    assert redacted(settings) == {
        "source": ["https://(hidden)@host.test/a.parquet?(hidden)", "s3://bucket/x", "a?b"]
    }
