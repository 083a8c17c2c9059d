"""Manifests: the same table is the same studies in any file, and no error repeats what stands in a cell."""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from mmfm_core.config import Site
from mmfm_core.config.model import Model
from mmfm_core.config.site import SplitFractions
from mmfm_core.data.dataset import load_dataset
from mmfm_core.data.manifest import Study, hashed_split, read_manifest
from mmfm_core.errors import MmfmError

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "?")
CANARY = "CANARY-PHI-123"

Row = Mapping[str, Any]


def model(**modalities: bool) -> Model:
    """A model of a scan, a note and a table; `modalities` says which of them are required."""
    optional = {name: not modalities.get(name, False) for name in ("scan", "note", "labs")}
    features = {"crp": {}, "sex": {"categories": ["f", "m"]}}
    return Model.model_validate(
        {
            "dim": 12,
            "modalities": {
                "scan": {"kind": "image2d", "size": [8, 8], "optional": optional["scan"]},
                "note": {"kind": "text", "optional": optional["note"]},
                "labs": {"kind": "tabular", "features": features, "optional": optional["labs"]},
            },
            "encoders": {"scan": {"type": "vit"}, "note": {"type": "bert"}, "labs": {"type": "feature_tokens"}},
            "fusion": {"type": "gated"},
            "heads": {"disease": {"type": "classification", "classes": ["healthy", "ill"]}},
        }
    )


def site(manifest: Path, **changes: Any) -> Site:
    return Site.model_validate(
        {
            "name": "north",
            "manifest": manifest,
            "study": "study",
            "patient": "patient",
            "modalities": {"note": "note", "labs": {"features": {"crp": "crp", "sex": "sex"}}},
            "targets": {"disease": {"column": "disease", "values": {0: "healthy", 1: "ill"}}},
        }
        | changes
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    kept = [
        {name: cell for name, cell in row.items() if cell is not None or index == 0} for index, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    parquet.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), path)


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    "m.csv": write_csv,
    "m.jsonl": write_jsonl,
    "m.parquet": write_parquet,
}


def table(folder: Path, *rows: Row, name: str = "m.csv") -> Path:
    """A manifest of the given rows, each over a row with everything."""
    whole = {"split": "train", "note": "a note", "crp": 1, "sex": "f", "disease": 0, "scan": ""}
    WRITERS[name](
        folder / name,
        [{"study": f"s{number}", "patient": f"p{number}"} | whole | dict(row) for number, row in enumerate(rows)],
    )
    return folder / name


def refused(asked: Site, wanted: Model | None = None) -> str:
    with pytest.raises(MmfmError) as error:
        read_manifest(asked, wanted or model())
    return str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda t: not t.strip().endswith(".0"))
identifiers = st.lists(st.integers(-(2**60), 2**60) | st.integers(0, 9), min_size=1, max_size=5, unique=True)


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    """Rows of one table, each column of one kind, as a database would export it."""
    patients = draw(identifiers.map(lambda numbers: [f"{n:03d}" for n in numbers]) | identifiers)
    split_of = {patient: draw(st.sampled_from(["train", "val", "test"])) for patient in patients}
    of = draw(st.lists(st.sampled_from(patients), min_size=1, max_size=6))
    numbers = draw(st.sampled_from([st.integers(-(2**40), 2**40), st.floats(-1e6, 1e6, width=32), st.just(2.0)]))
    labels = draw(st.sampled_from([st.sampled_from([0, 1]), st.sampled_from([0.0, 1.0])]))
    return [
        {
            "study": number,
            "patient": patient,
            "split": split_of[patient],
            "note": draw(st.none() | texts),
            "crp": draw(st.none() | numbers),
            "sex": draw(st.none() | st.sampled_from(["f", "m"])),
            "disease": draw(st.none() | labels),
        }
        for number, patient in enumerate(of)
    ]


def expected_studies(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """What the rows mean, without mmfm: study, patient, split, inputs, targets."""
    found = []
    for row in rows:
        inputs: dict[str, Any] = {}
        if row["note"] is not None and row["note"].strip() not in MISSING:
            inputs["note"] = row["note"].strip()
        if row["crp"] is not None or row["sex"] is not None:
            sex = None if row["sex"] is None else float("fm".index(row["sex"]))
            inputs["labs"] = [None if row["crp"] is None else float(row["crp"]), sex]
        targets = {} if row["disease"] is None else {"disease": int(row["disease"])}
        if inputs:
            found.append((str(row["study"]), str(row["patient"]), row["split"], inputs, targets))
    return found


def plain(studies: Sequence[Study]) -> list[tuple[Any, ...]]:
    """Studies as `expected_studies` has them."""
    return [
        (
            s.study,
            s.patient,
            s.split,
            {
                name: [None if math.isnan(number) else number for number in value] if isinstance(value, list) else value
                for name, value in s.inputs.items()
            },
            s.targets,
        )
        for s in studies
    ]


@given(rows=tables())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_a_table_is_the_same_studies_in_any_file(tmp_path: Path, rows: list[Row]) -> None:
    expected = expected_studies(rows)
    for name, write in WRITERS.items():
        write(tmp_path / name, rows)
        if expected:
            assert plain(read_manifest(site(tmp_path / name), model())) == expected
        else:
            assert "has no study with any modality" in refused(site(tmp_path / name))


@pytest.mark.parametrize("name", WRITERS)
def test_a_number_is_the_same_however_it_is_written(tmp_path: Path, name: str) -> None:
    """A gap in a column makes many an export write 1 as 1.0."""
    spelled = [["1", "1.0", "1.00", "01", " 1 "], [1, None, 0, 1, 1], [1.0, None, 0.0, 1.0, 1.0]]
    for cells in spelled:
        rows: list[Row] = [{"disease": cell, "patient": "p", "crp": cell} for cell in cells]
        studies = read_manifest(site(table(tmp_path, *rows, name=name)), model())
        assert {s.targets.get("disease") for s in studies} <= {None, 0, 1}
        assert {
            s.targets["disease"] for s, cell in zip(studies, cells, strict=True) if cell is not None and float(cell)
        } == {1}
    identifiers_ = [{"patient": 7}, {"patient": 8}]
    whole = read_manifest(site(table(tmp_path, *identifiers_, name=name)), model())
    gaps = read_manifest(site(table(tmp_path, {"patient": 7.0}, {"patient": 8.0}, name=name)), model())
    assert [s.patient for s in whole] == [s.patient for s in gaps] == ["7", "8"]


def test_what_pandas_hides_in_an_index_is_a_column(tmp_path: Path) -> None:
    rows = [{"patient": "p", "study": "s", "split": "train", "note": "n", "crp": 1, "sex": "f", "disease": 0}]
    frame = pa.Table.from_pylist(rows).to_pandas().set_index("patient")
    frame.to_parquet(tmp_path / "m.parquet")
    assert [s.patient for s in read_manifest(site(tmp_path / "m.parquet"), model())] == ["p"]


def test_columns_of_other_kinds_do_no_harm(tmp_path: Path) -> None:
    for name in ("m.jsonl", "m.parquet"):
        manifest = table(tmp_path, {"tags": ["a", "b"], "when": "2020-01-01"}, {"tags": [], "when": ""}, name=name)
        assert len(read_manifest(site(manifest), model())) == 2


def test_half_a_character_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"study": 1, "patient": "p\\ud83d", "split": "train", "note": "cut \\ud83d"}\n')
    (study,) = read_manifest(site(tmp_path / "m.jsonl", modalities={"note": "note"}, targets={}), model())
    study.patient.encode()
    assert str(study.inputs["note"]).startswith("cut ")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    manifest = table(tmp_path, {})
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    assert len(read_manifest(site(manifest), model())) == 1


def test_a_row_is_named_by_its_line_past_blank_lines_and_line_breaks_in_cells(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    lines = ["study,patient,split,note", "", 's1,p1,train,"two', 'lines"', ",,,", "s2,p2,tarin,x", ""]
    manifest.write_text("\n".join(lines))
    wrong = lines.index("s2,p2,tarin,x") + 1
    said = refused(site(manifest, modalities={"note": "note"}, targets={}))
    assert said.startswith(f"{manifest}, row {wrong}: column 'split'")
    manifest.write_text(manifest.read_text().replace("tarin", "train"))
    studies = read_manifest(site(manifest, modalities={"note": "note"}, targets={}), model())
    assert [(study.study, study.row) for study in studies] == [("s1", 3), ("s2", wrong)]
    json_lines = tmp_path / "m.jsonl"
    rows = [{"study": s, "patient": s, "split": split, "note": "x"} for s, split in (("a", "train"), ("b", "tarin"))]
    json_lines.write_text("\n\n".join(map(json.dumps, rows)))
    assert refused(site(json_lines, modalities={"note": "note"}, targets={})).startswith(f"{json_lines}, row 3: ")


@pytest.mark.parametrize("line", ["s,p,train,free, text", "s,p,train,note,"])
def test_rows_longer_than_the_header_do_not_shift_columns(tmp_path: Path, line: str) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("study,patient,split,note\n" + f"{line}\n" * 2)
    said = refused(site(manifest, modalities={"note": "note"}, targets={}))
    assert said == f"{manifest}: its rows have more cells than its header; put cells that hold commas in quotes"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "m.csv", "the manifest does not exist; check 'manifest' in the site's file"),
        ("x", "m.xlsx", "a manifest is one of .csv, .parquet, .jsonl; convert it"),
        ("", "m.csv", "cannot be read as csv (EmptyDataError); it is empty; export it again"),
        ("caf\udce9", "m.csv", "cannot be read as csv (UnicodeDecodeError); save it in UTF-8"),
        ("study;patient\n1;2\n", "m.csv", "its cells are separated by ';' or tabs; save it with commas between them"),
        ("study\tpatient\n1\t2\n", "m.csv", "its cells are separated by ';' or tabs; save it with commas between them"),
        (
            "study;note\n1;a, b\n2;a, b, c\n",
            "m.csv",
            "cannot be read as csv (ParserError); separate its cells by commas, and quote those that hold commas",
        ),
        ("PAR1", "m.parquet", "cannot be read as parquet (ArrowInvalid); export it again"),
        ('{"study":\n', "m.jsonl", "cannot be read as jsonl (JSONDecodeError); export it again"),
        ("study,patient\n", "m.csv", "site 'north' is empty: it has no rows"),
    ],
)
def test_a_file_that_is_no_manifest(tmp_path: Path, text: str | None, name: str, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert refused(site(tmp_path / name)) == f"{tmp_path / name}: {said}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"patient": "patien"},
            "there is no column 'patien' (named by 'patient' of site 'north'); did you mean 'patient'?",
        ),
        ({"study": "id"}, "there is no column 'id' (named by 'study' of site 'north'); compare it with the …"),
        ({"split": "fold"}, "there is no column 'fold' (named by 'split' of site 'north'); compare it with the …"),
        (
            {"modalities": {"note": "nte"}},
            "there is no column 'nte' (named by 'modalities.note' of site 'north'); did you …",
        ),
        (
            {"modalities": {"labs": {"features": {"crp": "CRP"}}}},
            "there is no column 'CRP' (named by 'modalities.labs.features.crp' of site 'north'); …",
        ),
        (
            {"targets": {"disease": "diseas"}},
            "there is no column 'diseas' (named by 'targets.disease' of site 'north'); …",
        ),
        ({"site": "hospital"}, "there is no column 'hospital' (named by 'site' of site 'north'); …"),
        ({"site": "study"}, "site 'north' is empty: no row has 'north' in column 'study'"),
    ],
)
def test_a_missing_column_is_named_with_who_asked_for_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    manifest = table(tmp_path, {})
    found = refused(site(manifest, **changes)).removeprefix(f"{manifest}: ")
    assert found == said or (said.endswith("…") and found.startswith(said.removesuffix("…")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"modalities": {"labs": "crp"}},
            "modalities.labs: a tabular modality is mapped by 'features: {FEATURE: COLUMN, ...}'",
        ),
        (
            {"modalities": {"note": {"features": {"crp": "crp"}}}},
            "modalities.note: a text modality is mapped by 'column: NAME'",
        ),
        (
            {"modalities": {"labs": {"features": {"crpp": "crp"}}}},
            "modalities.labs.features.crpp: the federation has no such feature; did you mean 'crp'?",
        ),
    ],
)
def test_a_mapping_of_another_kind(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert refused(site(table(tmp_path, {}), **changes)) == f"site 'north': {said}"


def test_a_name_out_of_the_header_is_told_to_nobody_else(tmp_path: Path) -> None:
    """Where the header was forgotten the first patient stands in its place."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("patient_0001,train,a cough\n" * 3)
    with pytest.raises(MmfmError) as caught:
        read_manifest(site(manifest, patient="patient_id", study=None), model())
    assert "patient_0001" in str(caught.value)
    assert "patient_0001" not in caught.value.told
    assert "there is no column 'patient_id'" in caught.value.told


FILE_IS_MISSING = (
    "column 'scan': the file does not exist; restore it, or set 'missing_files: absent' in the site's file"
)


@pytest.mark.parametrize(
    ("rows", "changes", "line", "said"),
    [
        ([{}, {"patient": ""}], {}, 3, "column 'patient' (patient) is empty; every study needs one"),
        (
            [{}, {}, {"study": "s0"}],
            {},
            4,
            "column 'study' (study): an earlier row has the same identifier; give each study its own, or drop the copy",
        ),
        ([{"split": CANARY}], {}, 2, "column 'split' (split) must be one of train, val, test"),
        ([{"split": ""}], {}, 2, "column 'split' (split) must be one of train, val, test"),
        (
            [{"patient": CANARY}, {}, {"patient": CANARY, "split": "test"}],
            {},
            "4 and row 2",
            "this patient is in split 'test' here and in 'train' there; keep each patient in one split, or a model is "
            "tested on patients it has seen",
        ),
        ([{}, {"crp": CANARY}], {}, 3, "column 'crp' is not a number; mend it, or list it under 'missing'"),
        ([{"crp": "inf"}], {}, 2, "column 'crp' is not a number; mend it, or list it under 'missing'"),
        ([{"crp": "1e39"}], {}, 2, "column 'crp' is not a number; mend it, or list it under 'missing'"),
        (
            [{"sex": CANARY}],
            {},
            2,
            "column 'sex' is none of f, m; rename its values under 'values', or list them under 'missing'",
        ),
        (
            [{"disease": CANARY}],
            {},
            2,
            "column 'disease' is none of healthy, ill; rename its values under 'values', or list them under 'missing'",
        ),
        ([{"scan": f"{CANARY}.png"}], {"modalities": {"scan": "scan"}}, 2, FILE_IS_MISSING),
        ([{"scan": CANARY * 500}], {"modalities": {"scan": "scan"}}, 2, FILE_IS_MISSING),
        ([{"scan": "a\0b"}], {"modalities": {"scan": "scan"}}, 2, FILE_IS_MISSING),
    ],
)
def test_a_bad_cell_is_named_by_row_and_column(
    tmp_path: Path, rows: list[Row], changes: dict[str, Any], line: int | str, said: str
) -> None:
    manifest = table(tmp_path, *rows)
    assert refused(site(manifest, **changes)) == f"{manifest}, row {line}: {said}"


def test_a_row_of_a_file_without_header_is_counted_from_one(tmp_path: Path) -> None:
    manifest = table(tmp_path, {}, {"crp": "x"}, name="m.jsonl")
    assert refused(site(manifest)).startswith(f"{manifest}, row 2: ")


def test_a_missing_file_may_be_an_absent_modality(tmp_path: Path) -> None:
    manifest = table(tmp_path, {"scan": "gone.png"}, {"scan": ""}, {"scan": "here.png"})
    Image.new("L", (8, 8)).save(tmp_path / "here.png")
    asked = site(manifest, modalities={"scan": "scan", "note": "note"}, missing_files="absent")
    studies = read_manifest(asked, model())
    assert [set(s.inputs) for s in studies] == [{"note"}, {"note"}, {"note", "scan"}]


def every_error(folder: Path) -> list[str]:
    """What can be said about a manifest that holds the canary in every cell, read as any column."""
    said = []
    columns = ("study", "patient", "split", "note", "crp", "sex", "disease", "scan")
    scan = {"scan": "scan"}
    labs = {"labs": {"features": {"crp": "crp", "sex": "sex"}}}
    (folder / f"{CANARY}.png").write_bytes(b"no image")
    for name, write in WRITERS.items():
        for good in columns:
            for modalities in (labs, {"note": "note"} | scan | labs):
                cells = {"study": "s", "patient": "p", "split": "train", "crp": 1, "sex": "f", "disease": 0, "scan": ""}
                for bad in (CANARY, f"{CANARY}.png", CANARY * 500, "", [CANARY]):
                    if isinstance(bad, list) and name == "m.csv":
                        continue
                    row = dict.fromkeys(columns, str(bad)) | {k: v for k, v in cells.items() if k != good} | {good: bad}
                    other = {"study": "t", "patient": bad, "split": "test"} if good == "patient" else {}
                    write(folder / name, [{**row, "note": CANARY}, {**row, "note": CANARY} | other])
                    for asked in (
                        site(folder / name, modalities=modalities),
                        site(folder / name, modalities=modalities, study=None, targets={}),
                    ):
                        try:
                            load_dataset(asked, model(scan=True))
                        except MmfmError as error:
                            said.append(str(error))
    for name in WRITERS:  # and where not even the cells can be told apart, or a patient stands in the header
        for text in (f'{CANARY},"{CANARY}\n{CANARY},1,2,3\n"{CANARY}', f"{CANARY},note\n{CANARY},a\n", f'["{CANARY}"]'):
            (folder / name).write_text(text)
            said.append(refused(site(folder / name)))
    return said


def test_no_error_holds_a_patients_value(tmp_path: Path) -> None:
    said = every_error(tmp_path)
    kinds = (
        "identifier",
        "(split)",
        "this patient",
        "not a number",
        "none of",
        "does not exist",
        "requires",
        "PNG",
        "read as",
    )
    for kind in kinds:
        assert any(kind in text for text in said), f"no error of the kind '{kind}' was provoked"
    assert not [text for text in said if CANARY in text]


def test_a_required_modality_must_be_there(tmp_path: Path) -> None:
    manifest = table(tmp_path, {}, {"note": "NA"})
    assert refused(site(manifest), model(note=True)) == (
        f"{manifest}, row 3: has no 'note', which the federation requires; fill it in, or declare 'optional: true' "
        "under model.modalities.note"
    )


def test_a_study_without_any_modality_is_left_out(tmp_path: Path) -> None:
    nothing = {"note": "", "crp": "?", "sex": "NA"}
    manifest = table(tmp_path, {}, nothing, {"note": ""}, nothing | {"crp": 0})
    studies = read_manifest(site(manifest), model())
    assert [(s.study, s.row, sorted(s.inputs)) for s in studies] == [
        ("s0", 2, ["labs", "note"]),
        ("s2", 4, ["labs"]),
        ("s3", 5, ["labs"]),
    ]


def test_a_column_has_its_own_missing_cells_and_values(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"crp": "-9", "sex": "w", "disease": "ja", "note": "-9"},
        {"crp": "-9.0", "sex": "None", "disease": "nein", "note": "unknown"},
        {"crp": "0", "sex": "9", "disease": "unknown", "note": "9"},
    ]
    asked = site(
        table(tmp_path, *rows),
        missing=["unknown"],
        modalities={
            "note": "note",
            "labs": {
                "features": {
                    "crp": {"column": "crp", "missing": [-9]},
                    "sex": {"column": "sex", "values": {"w": "f", "None": "m"}, "missing": [9]},
                }
            },
        },
        targets={"disease": {"column": "disease", "values": {"ja": "ill", "nein": "healthy"}}},
    )
    assert [(inputs, targets) for _, _, _, inputs, targets in plain(read_manifest(asked, model()))] == [
        ({"note": "-9", "labs": [None, 0.0]}, {"disease": 1}),
        ({"labs": [None, 1.0]}, {"disease": 0}),
        ({"note": "9", "labs": [0.0, None]}, {}),
    ]


def test_a_site_reads_its_own_rows_only(tmp_path: Path) -> None:
    rows: list[Row] = [{"crp": CANARY}, {"patient": "p", "scan": "north"}, {"split": CANARY, "patient": "p"}]
    studies = read_manifest(site(table(tmp_path, *rows), site="scan"), model())
    assert [(s.study, s.row) for s in studies] == [("s1", 3)]


FRACTIONS = SplitFractions(train=0.7, val=0.1, test=0.2)


def test_patients_are_hashed_into_splits_once_and_for_all(tmp_path: Path) -> None:
    patients = [f"patient {number}" for number in range(20_000)]
    counts = Counter(hashed_split(patient, FRACTIONS) for patient in patients)
    for split, fraction in FRACTIONS.model_dump().items():
        spread = 4 * math.sqrt(fraction * (1 - fraction) * len(patients))
        assert abs(counts[split] - fraction * len(patients)) < spread
    # By the formula of its own: a change here would move patients from training to testing between two runs.
    for patient in patients[:200]:
        position = int(hashlib.sha256(patient.encode()).hexdigest()[:16], 16) / 2**64
        assert hashed_split(patient, FRACTIONS) == ("train" if position < 0.7 else "val" if position < 0.8 else "test")


def test_a_hashed_patient_keeps_its_split_when_others_come(tmp_path: Path) -> None:
    asked = {"split": {"train": 0.4, "val": 0.3, "test": 0.3}}
    few: list[Row] = [{"patient": f"p{number % 10}"} for number in range(20)]
    more: list[Row] = [{"patient": f"q{number}"} for number in range(30)]
    before = read_manifest(site(table(tmp_path, *few), **asked), model())
    after = read_manifest(site(table(tmp_path, *more, *few), **asked), model())
    split_of = {s.patient: s.split for s in after}
    assert all(split_of[s.patient] == s.split for s in [*before, *after])
    assert len({s.split for s in before}) == 3
