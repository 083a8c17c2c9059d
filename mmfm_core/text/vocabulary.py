"""A WordPiece vocabulary of a body of text."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from mmfm_core.errors import MmfmError
from mmfm_core.text.tokenizer import SPECIAL, UNKNOWN, printable

_NORMALIZE, _SPLIT = BertNormalizer(lowercase=True), BertPreTokenizer()
# Always there, so that a word or number left out of the vocabulary is spelled and not lost.
_LETTERS = {*string.ascii_lowercase, *string.digits}


def train_vocabulary(texts: Iterable[str], size: int, min_frequency: int) -> str:
    """The text of a `vocab.txt`: at most `size` lower-cased BERT WordPiece pieces (Schuster & Nakajima 2012).

    A vocabulary leaves the hospital, so it must not carry what identifies someone: only words that stand in at least
    `min_frequency` texts take part, and digits are learned one by one, so that no piece holds two of them (no record
    number, no date). A name that stands in that many texts, such as a radiologist's, does enter: read the file before
    you share it. The same texts give the same file, in any order and any process.

    Raises `MmfmError` where no word is that frequent or `size` does not hold the single characters.
    """
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(set(_words(text)))
    words = sorted(word for word, count in frequency.items() if count >= min_frequency)
    if not words:
        raise MmfmError(
            f"No word stands in {min_frequency} of the texts: lower the minimum count, or check their column."
        )
    characters = sorted(_LETTERS.union(*words))
    # The trainer numbers '##' characters in the order of a randomly seeded hash table and breaks ties by number: only
    # as special tokens, numbered first and as given, do they make it deterministic.
    fixed = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if len(fixed) > size:
        raise MmfmError(
            f"A vocabulary of {size} pieces does not hold the single characters: ask for {len(fixed)} or more."
        )
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=min_frequency, special_tokens=fixed, show_progress=False)
    library = Tokenizer(WordPiece(unk_token=UNKNOWN))
    library.train_from_iterator((word for word in words for _ in range(frequency[word])), trainer)
    vocabulary = library.get_vocab()
    return "".join(f"{piece}\n" for piece in sorted(vocabulary, key=vocabulary.__getitem__))


def _words(text: str) -> Iterator[str]:
    undigited = re.sub(r"\d", " ", _NORMALIZE.normalize_str(printable(text)))
    return (word for word, _ in _SPLIT.pre_tokenize_str(undigited))
