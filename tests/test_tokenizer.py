"""Text as ids: bytes against UTF-8 itself, word pieces against the longest match searched by hand."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from mmfm_core.errors import MmfmError
from mmfm_core.text.tokenizer import SPECIAL, byte_tokenizer, wordpiece_tokenizer
from mmfm_core.text.vocabulary import train_vocabulary

CHARACTERS = list("abcdefghijklmnopqrstuvwxyz0123456789.,[]/")
PIECES = [*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), "heart", "no", "##rma", "norm", "##al", "size", "is"]
NUMBERS = {piece: number for number, piece in enumerate(PIECES)}
PAD, UNKNOWN, START, END, MASK = range(5)
REPORTS = [
    "Heart size is normal. Lungs are clear.",
    "Heart size is enlarged; MRN 4471123, seen by Dr. Grzegorz.",
    "Lungs are clear, 12 mm nodule at T12.",
    "The heart is normal in size; nodule of 8 mm. The lungs are clear.",
]
BYTES = byte_tokenizer()


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", "utf-8")
    return path


@pytest.fixture
def minilm(tmp_path):
    """A tokenizer.json as sentence-transformers publishes it: with truncation, padding and special added tokens."""
    library = Library(WordPiece(NUMBERS, unk_token=SPECIAL[UNKNOWN]))
    library.normalizer, library.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    library.decoder = WordPieceDecoder()
    library.add_special_tokens(list(SPECIAL))
    library.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", START), ("[SEP]", END)]
    )
    library.enable_truncation(6)
    library.enable_padding(length=6)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    return path


def longest_match(text):
    """WordPiece by its definition, for lower-case ASCII."""
    numbers = []
    for word in re.findall(r"\w+|[^\w\s]", text):
        rest, mark = word, ""
        while rest:
            end = next(n for n in range(len(rest), 0, -1) if mark + rest[:n] in NUMBERS)
            numbers.append(NUMBERS[mark + rest[:end]])
            rest, mark = rest[end:], "##"
    return numbers


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30)))
def test_bytes_are_utf8_and_come_back(texts):
    ids, cut = BYTES.ids(texts, 121)
    for row, text in zip(ids.tolist(), texts, strict=True):
        content = [byte + 3 for byte in text.encode()]
        assert row == [*content, BYTES.end_id] + [BYTES.pad_id] * (120 - len(content))
    assert (ids.dtype, ids.shape, cut) == (torch.int64, (len(texts), 121), 0)
    assert BYTES.texts(ids) == texts


@pytest.mark.parametrize(("length", "cut"), [(3, 2), (4, 1), (5, 0)])
def test_a_cut_text_ends_with_the_end_token_and_is_counted(length, cut):
    ids, found = BYTES.ids(["abcd", "abc", ""], length)
    assert found == cut
    assert (ids == BYTES.end_id).sum(1).tolist() == [1, 1, 1]
    assert BYTES.texts(ids) == ["abcd"[: length - 1], "abc"[: length - 1], ""]


def test_no_byte_has_the_number_of_a_special_token():
    content = set(BYTES.ids(["".join(map(chr, range(256)))], 1000)[0][0].tolist())
    assert content & BYTES.special == {BYTES.pad_id, BYTES.end_id}
    assert len({BYTES.pad_id, BYTES.start_id, BYTES.end_id, BYTES.mask_id} & BYTES.special) == 4
    assert max(content | BYTES.special) < BYTES.size


@given(text=st.text("abchnormlsize 019.,[]/", max_size=40))
def test_pieces_are_the_longest_matches(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES), "utf-8")
    content = longest_match(text)
    ids, cut = wordpiece_tokenizer(path).ids([text.upper()], 64)
    assert ids[0].tolist() == [START, *content, END] + [PAD] * (62 - len(content))
    assert cut == 0


def test_a_published_tokenizer_file_reads_like_its_vocabulary(minilm, vocabulary):
    texts = ["Heart size is normal, no heart is abnormal.", "", "no"]
    json, plain = wordpiece_tokenizer(minilm), wordpiece_tokenizer(vocabulary)
    ids, cut = json.ids(texts, 32)
    assert ids.tolist() == plain.ids(texts, 32)[0].tolist()
    assert (cut, json.ids(texts, 5)[1]) == (0, 1)  # the file's own truncation to 6 is off
    assert json.ids(texts, 5)[0][0].tolist() == [START, *longest_match("heart size is"), END]
    assert json.texts(ids) == plain.texts(ids) == [texts[0].lower(), "", "no"]
    assert (json.size, json.pad_id, json.start_id, json.end_id, json.mask_id) == (len(PIECES), PAD, START, END, MASK)
    assert json.special == plain.special == {PAD, UNKNOWN, START, END, MASK}


def test_a_special_token_spelled_in_a_note_is_plain_text(minilm, vocabulary):
    for path in (minilm, vocabulary):
        content = wordpiece_tokenizer(path).ids(["no [MASK] [SEP] [PAD]"], 64)[0][0].tolist()
        assert content[: content.index(END) + 1] == [START, *longest_match("no [mask] [sep] [pad]"), END]
    assert BYTES.texts(BYTES.ids(["a</s>b<pad><unk>"], 64)[0]) == ["a</s>b<pad><unk>"]


def test_a_special_token_that_is_also_a_word_becomes_unknown(tmp_path):
    library = Library(WordPiece(NUMBERS, unk_token=SPECIAL[UNKNOWN]))
    library.pre_tokenizer = WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    ids = wordpiece_tokenizer(tmp_path / "tokenizer.json").ids(["no [MASK] heart"], 6)[0][0]
    assert ids.tolist() == [START, NUMBERS["no"], UNKNOWN, NUMBERS["heart"], END, PAD]


def test_a_cased_vocabulary_keeps_capitals(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "Heart", "heart"]))
    ids = wordpiece_tokenizer(tmp_path / "vocab.txt").ids(["Heart heart"], 4)[0][0]
    assert ids.tolist() == [START, 5, 6, END]


@pytest.mark.parametrize("text", ["\0", "\ud800 no", "\x07\x1b[0m\x85", "\U0001fac0\u200d", "a" * 10_000, "\u202eno"])
def test_odd_text_is_a_row_like_any_other(minilm, text):
    for tokenizer in (BYTES, wordpiece_tokenizer(minilm)):
        row = tokenizer.ids([text, "no"], 16)[0].tolist()
        assert row[0].count(tokenizer.end_id) == 1
        assert row[1] == tokenizer.ids(["no"], 16)[0][0].tolist()
        assert len(tokenizer.texts(torch.tensor(row))) == 2


def test_decoding_stops_at_the_first_end_and_drops_special_tokens(vocabulary):
    no, heart = NUMBERS["no"], NUMBERS["heart"]
    rows = [[START, no, MASK, heart, END, no], [no, PAD, heart, UNKNOWN, START, no], [END, no, no, no, no, no]]
    assert wordpiece_tokenizer(vocabulary).texts(torch.tensor(rows)) == ["no heart", "no heart no", ""]
    a, end = 97 + 3, BYTES.end_id
    assert BYTES.texts(torch.tensor([[BYTES.start_id, a, BYTES.mask_id, a, end, a]])) == ["aa"]


@pytest.mark.parametrize("gone", SPECIAL)
def test_a_vocabulary_without_a_special_token_is_refused(tmp_path, gone):
    (tmp_path / "vocab.txt").write_text("\n".join(piece for piece in PIECES if piece != gone))
    with pytest.raises(MmfmError, match=re.escape(f"lacks {gone}: use a BERT WordPiece vocabulary")):
        wordpiece_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "was not found: give the path"),
        ("vocab.txt", b"\xff\xfe\x00heart", "export it again"),
        ("vocab.txt", "\n".join([*PIECES, "heart"]).encode(), "each once"),
        ("vocab.txt", b"", "lacks [PAD], [UNK], [CLS], [SEP], [MASK]"),
        ("tokenizer.json", b"{", "neither a tokenizer.json"),
        ("tokenizer.json", b'{"vocab": {}}', "neither a tokenizer.json"),
        ("tokenizer.json", Library(BPE({"a": 0}, [])).to_str().encode(), "lacks [PAD]"),
    ],
)
def test_what_is_no_vocabulary_is_refused_with_a_remedy(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MmfmError, match=re.escape(message)):
        wordpiece_tokenizer(tmp_path / name)


def test_a_trained_vocabulary_is_the_same_in_every_process():
    program = (
        "import sys; from mmfm_core.text.vocabulary import train_vocabulary\n"
        "words = [f'{a}{b}{c}' for a in 'abcdef' for b in 'ghijkl' for c in 'mnopqr']\n"
        "texts = [' '.join(words[i::7]) for i in range(7)]\n"
        "print(train_vocabulary(texts[:: int(sys.argv[1])], 200, 1))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, order],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed, order in [("1", "1"), ("2", "1"), ("3", "-1"), ("4", "1")]
    }
    assert len(found) == 1
    assert found.pop().count(b"\n") == 201


def test_a_trained_vocabulary_holds_frequent_words_and_no_rare_one_and_no_number():
    pieces = train_vocabulary(REPORTS, 1000, 2).split()
    assert pieces[:5] == list(SPECIAL)
    assert len(set(pieces)) == len(pieces)
    assert {"heart", "lungs", "nodule", "clear"} <= set(pieces)
    content = [piece.removeprefix("##") for piece in pieces[5:]]
    frequent = "heart size is normal lungs are clear mm nodule the . , ;"
    assert all(len(p) == 1 or p in frequent for p in content)
    assert not [piece for piece in content if sum(c.isdigit() for c in piece) > 1]
    # "mrn" is said several times, by one patient.
    assert "mrn" not in train_vocabulary(["mrn mrn mrn clear", "clear"], 1000, 2).split()


def test_what_is_left_out_of_a_trained_vocabulary_is_spelled(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(train_vocabulary(REPORTS, 1000, 2), "utf-8")
    tokenizer = wordpiece_tokenizer(path)
    ids, _ = tokenizer.ids(["Dr. Grzegorz, 4471123; T12"], 64)
    assert tokenizer.texts(ids) == ["dr. grzegorz, 4471123 ; t12"]
    assert tokenizer.size == len(path.read_text("utf-8").split())


def test_a_trained_vocabulary_keeps_its_size():
    assert len(train_vocabulary(REPORTS, 90, 1).split()) == 90


@pytest.mark.parametrize(("size", "count", "message"), [(50, 1, "ask for "), (500, 9, "lower the minimum count")])
def test_a_vocabulary_that_cannot_be_trained_names_the_remedy(size, count, message):
    with pytest.raises(MmfmError, match=message):
        train_vocabulary(REPORTS, size, count)


def test_byte_ids_are_numbered_as_byt5_numbers_them():
    library = ByT5Tokenizer(extra_ids=0)
    assert (BYTES.size, BYTES.mask_id) == (len(library) + 1, len(library))
    assert (BYTES.pad_id, BYTES.end_id, BYTES.start_id) == (0, library.eos_token_id, library.unk_token_id)
    assert BYTES.pad_id == library.pad_token_id
    assert BYTES.special == {*library.all_special_ids, BYTES.mask_id}
