"""The tokenizer of a vocabulary."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from minrnn.tasks import Vocabulary
from minrnn.tasks.subwords import read_tokenizer
from minrnn.tasks.vocabulary import END_OF_TEXT

UNBOUNDED = 10**30
"""transformers' own number for a model that reads texts of any length."""

MARKS = ("bos_token", "eos_token", "pad_token")
"""transformers' names of the end of text."""


def make_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Return the tokenizer that gives the ids of a vocabulary.

    The end of text, if the vocabulary has one, stands before each text, as before a document; with
    `add_special_tokens=False` it does not. It is also what batches are padded with, on the left, and what
    ends generation. No text is encoded to it, not even its own characters.

    Raises:
        ImportError: tokenizers is not installed.
    """
    mark = {} if vocabulary.end_of_text is None else dict.fromkeys(MARKS, END_OF_TEXT)
    return PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(vocabulary.to_tokenizer()),
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=UNBOUNDED,
        padding_side="left",
        **mark,
    )
