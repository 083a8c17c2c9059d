"""Free text: token ids, vocabularies, and the findings a report states."""

from pathlib import Path

from mmfm_core.artifacts import find
from mmfm_core.config.model import ByteTokenizer, WordPieceTokenizer
from mmfm_core.text.tokenizer import Tokenizer, byte_tokenizer, wordpiece_tokenizer

__all__ = ["Tokenizer", "open_tokenizer"]


def open_tokenizer(config: ByteTokenizer | WordPieceTokenizer, artifacts: Path) -> Tokenizer:
    """The tokenizer that a document names, its vocabulary from the folder of pinned files."""
    return byte_tokenizer() if config.type == "bytes" else wordpiece_tokenizer(find(artifacts, config.vocabulary))
