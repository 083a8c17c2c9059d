"""Text to token ids and back."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from mmfm_core.errors import MmfmError

PAD, UNKNOWN, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Tokenizer:
    """Texts as rows of ids: `prefix`, the text's own ids, the end token, padding.

    `special` ids are neither masked nor generated as content. `encode` gives a text's own ids and never a special one
    but the unknown; `decode` is its inverse as far as there is one.
    """

    size: int
    pad_id: int
    start_id: int
    end_id: int
    mask_id: int
    special: frozenset[int]
    prefix: tuple[int, ...]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]

    def ids(self, texts: list[str], max_length: int) -> tuple[Tensor, int]:
        """Ids [N, max_length] int64, and the number of texts that had to be cut.

        Every row holds the end token, a cut one too, so that an absent text is still a sequence (its presence mask
        removes it).
        """
        ids = torch.full((len(texts), max_length), self.pad_id)
        cut = 0
        for row, text in zip(ids, texts, strict=True):
            tokens = [*self.prefix, *self.encode(printable(text))]
            cut += len(tokens) >= max_length
            tokens = [*tokens[: max_length - 1], self.end_id]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, cut

    def texts(self, ids: Tensor) -> list[str]:
        """Texts of ids [N, L], each up to its first end token and without special tokens."""
        rows = (row[: row.index(self.end_id)] if self.end_id in row else row for row in ids.tolist())
        return [self.decode([token for token in row if token not in self.special]) for row in rows]


def printable(text: str) -> str:
    """The text with '?' for every half of a surrogate pair, which no encoder of UTF-8 accepts."""
    return text.encode("utf-8", "replace").decode()


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids, the numbering of ByT5 (Xue et al. 2022): no file, no vocabulary, any language.

    ByT5 starts a decoder with the padding token; here padding means "nothing there", so a generated text starts with
    the unknown token instead, which no text holds since every byte has its id. The mask is the first id beyond the
    bytes, the place of ByT5's own first sentinel.
    """
    pad, end, unknown, mask = 0, 1, 2, 3 + 256
    return Tokenizer(
        size=mask + 1,
        pad_id=pad,
        start_id=unknown,
        end_id=end,
        mask_id=mask,
        special=frozenset({pad, end, unknown, mask}),
        prefix=(),
        # Split: a note may spell '<pad>' or '</s>' without meaning it.
        encode=lambda text: _byt5().encode(text, split_special_tokens=True, add_special_tokens=False),
        decode=lambda ids: _byt5().decode(ids),
    )


@cache
def _byt5() -> Any:
    from transformers import ByT5Tokenizer  # seconds, which a federation without texts need not wait

    return ByT5Tokenizer(extra_ids=0)


def _is_json(content: str) -> bool:
    # By what it holds: a pinned file is named by its hash alone.
    return re.match(r'\s*\{\s*"', content) is not None


def wordpiece_tokenizer(path: Path) -> Tokenizer:
    """WordPiece ids from a `tokenizer.json` (tokenizers library) or a BERT `vocab.txt`, rows as [CLS] pieces [SEP].

    Raises `MmfmError` where the file is missing, is neither of the two, or lacks one of BERT's five special tokens.
    """
    if not path.is_file():
        raise MmfmError(f"Vocabulary '{path}' was not found: give the path of a tokenizer.json or a BERT vocab.txt.")
    try:
        content = path.read_text("utf-8")
        library = (
            tokenizers.Tokenizer.from_str(content)
            if path.suffix == ".json" or _is_json(content)
            else _from_pieces(content)
        )
    except Exception as error:  # the library raises bare exceptions
        raise MmfmError(
            f"Vocabulary '{path}' is neither a tokenizer.json of the tokenizers library nor a vocab.txt with one piece "
            "a line, each once: export it again."
        ) from error
    pieces = library.get_vocab()
    if missing := [token for token in SPECIAL if token not in pieces]:
        raise MmfmError(
            f"Vocabulary '{path}' lacks {', '.join(missing)}: use a BERT WordPiece vocabulary, "
            "such as `mmfm vocabulary` writes."
        )
    # Published files bring their own truncation and padding (MiniLM: 128 tokens), which would hide that a text was cut.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # a note may spell '[MASK]' without meaning it
    added = {number for number, token in library.get_added_tokens_decoder().items() if token.special}
    special = frozenset({*(pieces[token] for token in SPECIAL), *added})
    return Tokenizer(
        size=max(pieces.values()) + 1,
        pad_id=pieces[PAD],
        start_id=pieces[START],
        end_id=pieces[END],
        mask_id=pieces[MASK],
        special=special,
        prefix=(pieces[START],),
        encode=partial(_pieces_of, library, special, pieces[UNKNOWN]),
        decode=library.decode,
    )


def _pieces_of(library: tokenizers.Tokenizer, special: frozenset[int], unknown: int, text: str) -> list[int]:
    # A vocabulary that splits at spaces only finds a spelled-out '[PAD]' among its pieces.
    return [unknown if i in special else i for i in library.encode(text, add_special_tokens=False).ids]


def _from_pieces(content: str) -> tokenizers.Tokenizer:
    # Not splitlines(): it also cuts at characters that may be pieces.
    pieces = [line.rstrip("\r") for line in content.rstrip("\r\n").split("\n")]
    if len(set(pieces)) < len(pieces):
        raise ValueError("A piece stands twice.")
    library = tokenizers.Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    # A vocab.txt does not say whether it is cased; its pieces do.
    library.normalizer = BertNormalizer(lowercase=not any(re.search("[A-Z]", p) for p in pieces if p not in SPECIAL))
    library.pre_tokenizer = BertPreTokenizer()
    library.decoder = WordPieceDecoder()
    return library
