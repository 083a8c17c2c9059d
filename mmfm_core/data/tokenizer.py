"""Text to token ids."""

import torch
from torch import Tensor
from transformers import ByT5Tokenizer

_BYTES = ByT5Tokenizer(extra_ids=0)
PAD_ID: int = _BYTES.pad_token_id
VOCABULARY: int = len(_BYTES)


def tokenize(texts: list[str], max_length: int) -> tuple[Tensor, int]:
    """UTF-8 bytes as ids [N, max_length], and the number of texts that had to be cut.

    Every row holds at least the end token, so that an absent text is still a sequence (its presence mask removes it).
    """
    ids = torch.full((len(texts), max_length), PAD_ID)
    cut = 0
    # Split: a note may spell '<pad>' or '</s>' without meaning it.
    for row, tokens in zip(ids, _BYTES(texts, split_special_tokens=True)["input_ids"], strict=True):
        if len(tokens) > max_length:
            cut += 1
            tokens = [*tokens[: max_length - 1], _BYTES.eos_token_id]  # noqa: PLW2901
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, cut
