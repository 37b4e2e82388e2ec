"""A tokenizer of a few words with BERT's frame, made here: [CLS] text [SEP], [CLS] one [SEP] other [SEP]."""

from __future__ import annotations

from typing import Any

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "query", ":", "word"]
PAD, UNK, CLS, SEP, A, B, C, QUERY, COLON, WORD = range(len(WORDS))


def word_tokenizer(*, frame: bool = True) -> Any:
    """A `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    return tokenizer
