"""The tokenizer's own errors."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from bigsae.config import UserError
from bigsae.data import tokenizer as module
from bigsae.data.tokens import check_vocabulary, load_tokenizer
from tests.models import tiny_llama, tiny_tokenizer


def test_a_saved_tokenizer_loads(tmp_path):
    original = tiny_tokenizer(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("peace and law")["input_ids"] == original("peace and law")["input_ids"]


@pytest.mark.parametrize("where", ["absent", "empty", "model"])
def test_a_model_without_tokenizer_is_refused(where, tmp_path):
    folder = tmp_path / where
    if where == "empty":
        folder.mkdir()
    elif where == "model":
        tiny_llama(folder)
        for file in folder.glob("token*"):
            file.unlink()
    with pytest.raises(UserError, match=r"^--model .*: its tokenizer cannot be loaded: .") as raised:
        load_tokenizer(str(folder))
    assert "\n" not in str(raised.value)


def test_check_vocabulary_counts_ids_that_can_be_given(tokenizer):
    size = max(tokenizer.get_vocab().values()) + 1
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 100)
    with pytest.raises(UserError, match=f"ids up to {size - 1}, but the model embeds only {size - 1}"):
        check_vocabulary(tokenizer, size - 1)


def test_check_vocabulary_sees_added_tokens(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=f"ids up to {size}"):
        check_vocabulary(tokenizer, size)


def test_a_tokenizer_without_separator_is_noted_once(tmp_path, caplog):
    module._say_once.cache_clear()
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.bos_token = tokenizer.eos_token = None
    with caplog.at_level(logging.INFO, "bigsae"):
        for _ in range(3):
            assert module.layout_for(tokenizer, 8, False).separator is None
    assert caplog.text.count("neither EOS nor BOS") == 1


def test_ids_are_kept_in_the_smallest_dtype(tokenizer):
    class Large:
        bos_token_id, eos_token_id = 0, 1

        def __init__(self, size):
            self.size = size

        def get_vocab(self):
            return {"last": self.size - 1}

    assert module.layout_for(Large(1 << 16), 8, False).dtype is np.uint16
    assert module.layout_for(Large((1 << 16) + 1), 8, False).dtype is np.uint32


@pytest.mark.parametrize("is_python", [False, True])
def test_truncation_and_padding_of_the_tokenizer_are_not_heeded(is_python, tmp_path):
    sentence = "we will work for the people of this nation because"
    tokenizer = tiny_tokenizer(tmp_path)
    expected = [tokenizer(text)["input_ids"] for text in ("we", sentence)]
    assert len(expected[0]) < 4 < len(expected[1])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    given = (lambda *args, **kwargs: tokenizer(*args, **kwargs)) if is_python else tokenizer
    encode = module.encoder(given, module.layout_for(tokenizer, 8, False))
    assert [ids.tolist() for ids in encode(["we", sentence])] == expected


def test_a_tokenizer_that_does_more_than_its_backend_is_heeded(tmp_path):
    original = tiny_tokenizer(tmp_path)

    class Lower:
        bos_token_id, eos_token_id = original.bos_token_id, original.eos_token_id
        backend_tokenizer, get_vocab = original.backend_tokenizer, original.get_vocab

        def __call__(self, texts, **kwargs):
            return original([text.lower() for text in texts], **kwargs)

    encode = module.encoder(Lower(), module.layout_for(Lower(), 8, False))
    assert encode(["PEACE"])[0].tolist() == original("peace")["input_ids"]
