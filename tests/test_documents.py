"""Documents: what is wrong is said in a sentence with its place and its remedy."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_federation

from mmfm_core.config import Site, load_federation, load_site, load_sites
from mmfm_core.errors import MmfmError

SITE: Mapping[str, Any] = {"name": "north", "manifest": "m.csv", "modalities": {"note": "note"}}


def edited(document: Mapping[str, Any], place: str, value: Any) -> str:
    """The document as YAML, with what stands at the dotted `place` replaced."""
    document = yaml.safe_load(yaml.safe_dump(dict(document)))
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner: Any = document
    for part in way:
        inner = inner[part]
    inner[last] = value
    return yaml.safe_dump(document, sort_keys=False)


def complaint(folder: Path, text: str, load: Callable[[Path], object] = load_federation) -> str:
    """What loading says is wrong, without the file's name, which must come first in every line."""
    path = folder / "document.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MmfmError) as error:
        load(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    said = "\n".join(line.removeprefix(str(path)).removeprefix(": ") for line in lines)
    for jargon in ("value_error", "type=", "Input", "pydantic", "validation", "NoneType", "dictionary", "instance"):
        assert jargon not in said
    return said


def reads(found: str, said: str) -> bool:
    """Whether a text is as expected; '…' stands for anything."""
    return re.fullmatch(re.escape(said).replace("…", ".*"), found, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("stges", 1, "unknown key 'stges'; did you mean 'stages'?"),
        ("stages.0.local_step", 3, "stages.0: unknown key 'local_step'; did you mean 'local_steps'?"),
        ("model.modalities.scan.chanels", 3, "model.modalities.scan: unknown key 'chanels'; did you mean 'channels'?"),
        (
            "model.modalities.scan.normalize",
            {"mean": 0, "st": 1},
            "model.modalities.scan.normalize: unknown key 'st'; did you mean 'std'?",
        ),
        (
            "model.modalities.scan.normalize",
            "sight",
            "model.modalities.scan.normalize: must be 'site', 'study' or 'foreground'",
        ),
        ("model.modalities.scan.normalize", {"mean": 0, "std": 0}, "…normalize.std: must be greater than 0"),
        ("model.modalities.scan.normalize", {"mean": math.nan, "std": 1}, "…normalize.mean: must be a number"),
        ("model.modalities.scan.size", [16], "model.modalities.scan.size.1: is missing"),
        ("model.modalities.scan.kind", "image3d", "…scan: unknown 'kind' 'image3d'; did you mean 'image2d'?"),
        (
            "model.modalities.scan.kind",
            None,
            "model.modalities.scan: unknown 'kind' 'None'; known: image2d, tabular, text, volume3d",
        ),
        ("model.modalities.scan", {}, "model.modalities.scan: 'kind' is missing"),
        (
            "model.modalities.labs.features",
            {"sex": {"catgories": ["a", "b"]}},
            "model.modalities.labs.features.sex: unknown key 'catgories'; did you mean 'categories'?",
        ),
        (
            "model.modalities.labs.features",
            {"sex": {"categories": ["f"]}},
            "….categories: must have at least 2 of them",
        ),
        ("model.modalities.labs.features", {"sex": {"categories": ["f", "f"]}}, "….categories: 'f' is named twice"),
        (
            "model.modalities.labs.features",
            [["a"]],
            "model.modalities.labs.features: must be a mapping, like {key: value}",
        ),
        (
            "model.encoders.scan",
            {"type": "vit", "patch_size": 5},
            "model.encoders.scan.patch_size: side 16 of modality 'scan' is not a multiple of 5",
        ),
        (
            "model.encoders.lab",
            {"type": "feature_tokens"},
            "….encoders.lab: there is no modality 'lab'; did you mean 'labs'?",
        ),
        ("model.encoders.scan", {"type": "bert"}, "model.encoders.scan.type: 'bert' does not read image2d; use vit…"),
        ("model.encoders.note", {"type": "bert", "heads": 5}, "model.encoders.note.heads: 5 does not divide dim 12"),
        (
            "model.encoders",
            {},
            "model.modalities.labs: has no encoder; add one under 'encoders', of type feature_tokens",
        ),
        ("model.fusion", {"type": "gatd"}, "model.fusion: unknown 'type' 'gatd'; did you mean 'gated'?"),
        ("model.fusion", "gated", "model.fusion: must be a mapping, like {key: value} or {}"),
        ("model.heads.disease.classes", [False, True], "….classes.0: true and false must be in quotes here\n…"),
        (
            "model.heads.disease.classes",
            ["ill", "None"],
            "…: 'None' in a manifest means that the value is missing; choose …",
        ),
        ("stages.0.rounds", -1, "stages.0.rounds: must be greater than 0"),
        ("stages.0.rounds", 2.5, "stages.0.rounds: must be a whole number"),
        ("stages.0.rounds", "two", "stages.0.rounds: must be a whole number"),
        ("stages.0.optimizer", {"lr": math.inf}, "stages.0.optimizer.lr: must be a number"),
        ("stages.0.train", "*", "stages.0.train: must be a list, like [a, b]"),
        (
            "stages.0.tasks",
            {"diseas": {}},
            "stages.0.tasks.diseas: there is no such head or objective; did you mean 'disease'?",
        ),
        ("stages.0.tasks", {"disease": None}, "stages.0.tasks.disease: must be a mapping, like {key: value} or {}"),
        ("stages.0.tasks", {}, "stages.0.tasks: must have at least 1 of them"),
        ("stages.1.rounds", 2, "stages.1.rounds: a stage that is not federated has no rounds; give it local_steps"),
        ("stages.1.name", "train", "stages.0.name: 'train' is used twice"),
        (
            "stages.0.federated",
            False,
            "stages.0.rounds: a stage that is not federated has no rounds; give it local_steps",
        ),
        ("aggregation.sites_per_round", 1, "aggregation.sites_per_round: 1 sites can never give the replies of min_…"),
        ("evaluation", {"illness": {}}, "evaluation.illness: there is no such head; known: disease"),
        (
            "evaluation",
            {"disease": {"metrics": ["aurok"]}},
            "evaluation.disease.metrics: classification is not measured by 'aurok'; did you mean 'auroc'?",
        ),
        ("name", "two words", "name: must start with a letter and hold only letters, digits, '_' and '-'"),
        ("name", 5, "name: must be text; put it in quotes"),
        ("seed", "abc", "seed: must be a whole number"),
    ],
)
def test_a_mistake_is_said_with_its_place_and_remedy(tmp_path: Path, place: str, value: Any, said: str) -> None:
    found = complaint(tmp_path, edited(tiny_federation().model_dump(mode="json"), place, value))
    assert reads(found, said)


def test_a_federated_stage_cannot_follow_an_adapting_one(tmp_path: Path) -> None:
    document = tiny_federation().model_dump(mode="json")
    document["stages"].reverse()
    assert complaint(tmp_path, yaml.safe_dump(document)) == (
        "stages.1: a federated stage cannot follow one that adapts at the sites; what a site adapted is never sent"
    )


def test_every_mistake_has_its_own_line(tmp_path: Path) -> None:
    document = tiny_federation().model_dump(mode="json")
    del document["name"]
    document["stages"][0]["rounds"] = 0
    said = complaint(tmp_path, yaml.safe_dump(document)).splitlines()
    assert said == ["name: is missing", "stages.0.rounds: must be greater than 0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping of keys, like 'name: my-federation'"),
        ("- a\n", "must be a mapping of keys, like 'name: my-federation'"),
        ("name: a\nname: b\n", ", line 2, column 1: 'name' is written twice (first in line 1); keep one"),
        ("model:\n\tdim: 3\n", ", line 2, column 1: there is a tab; YAML indents with spaces"),
        ("name: a: b\n", ", line 1, column 8: mapping values are not allowed here"),
        ("name: {{ x }}\n", ", line 1, column 8: a key must be a word"),
        ("name: &loop {a: *loop}\n", ", line 1, column 7: found unconstructable recursive node"),
        (
            "name: a\n---\nname: b\n",
            ", line 2, column 1: expected a single document in the stream, but found another …",
        ),
        ("name: !!python/object/apply:os.getcwd []\n", ", line 1, column 7: could not determine a constructor for …"),
        ("name: !!bool maybe\n", "holds something that YAML cannot hold (KeyError)"),
        ("seed: " + "[" * 3000, "holds something that YAML cannot hold (RecursionError)"),
        (
            "name: ${MMFM_TEST_UNSET}\n",
            "the environment variable MMFM_TEST_UNSET is not set, and ${MMFM_TEST_UNSET} gives …",
        ),
    ],
)
def test_what_is_no_document_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    found = complaint(tmp_path, text)
    assert reads(found, said)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(MmfmError) as error:
            load_federation(path)
        assert str(error.value) == f"{path}: cannot be read ({reason})"


def test_only_true_is_true(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "name: no\nmanifest: m.csv\nmodalities: {no: on}\nmissing: [010, 2001-02-03, 12:30, ~x, -1, 1.0]\n"
        "targets: {ill: {column: y, values: {no: absent, yes: present, 1.0: present, 0: absent}}}\n"
    )
    site = load_site(path)
    assert (site.name, list(site.modalities)) == ("no", ["no"])
    assert site.missing == ("010", "2001-02-03", "12:30", "~x", "-1", "1")
    assert site.targets["ill"].values == {"no": "absent", "yes": "present", "1": "present", "0": "absent"}


def test_an_alias_and_a_merge_are_read(tmp_path: Path) -> None:
    document = tiny_federation().model_dump(mode="json", exclude={"stages"})
    path = tmp_path / "federation.yaml"
    path.write_text(
        yaml.safe_dump(document)
        + "stages:\n  - &base {name: a, rounds: 3, tasks: {disease: {}}}\n  - {<<: *base, name: b}\n"
    )
    assert [(stage.name, stage.rounds) for stage in load_federation(path).stages] == [("a", 3), ("b", 3)]


def test_an_environment_variable_or_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: north\nmanifest: ${MMFM_TEST_DATA:-/default}/m.csv\nmodalities: {note: note}\n")
    assert load_site(path).manifest == Path("/default/m.csv")
    monkeypatch.setenv("MMFM_TEST_DATA", "/elsewhere")
    assert load_site(path).manifest == Path("/elsewhere/m.csv")


SITES = """
defaults:
  manifest: data/m.csv
  missing: [-9]
  split: {column: fold, train: [a], val: [], test: [b]}
  modalities:
    note: report
    labs: {features: {crp: crp, age: age}}
sites:
  plain: {}
  none:
  amended:
    manifest: /absolute/m.csv
    missing: null
    split: {column: null, train: 0.8, val: 0.1, test: 0.1, }
    modalities: {note: null, labs: {features: {age: null, crp: {column: CRP}}}}
"""


def test_a_sites_file_amends_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "sites.yaml"
    path.write_text(SITES)
    sites = load_sites(path)
    expected = Site.model_validate(
        {
            "name": "plain",
            "manifest": tmp_path / "data/m.csv",
            "missing": ["-9"],
            "split": {"column": "fold", "train": ["a"], "val": [], "test": ["b"]},
            "modalities": {"note": "report", "labs": {"features": {"crp": "crp", "age": "age"}}},
        }
    )
    assert sites["plain"] == expected
    assert sites["none"] == expected.model_copy(update={"name": "none"})
    amended = sites["amended"].model_dump(mode="json", exclude_defaults=True)
    assert amended == {
        "name": "amended",
        "manifest": "/absolute/m.csv",
        "split": {"train": 0.8, "val": 0.1, "test": 0.1},
        "modalities": {"labs": {"features": {"crp": {"column": "CRP"}}}},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("site: {a: {}}", "unknown key 'site'; did you mean 'sites'?"),
        ("sites: {}", "sites: must hold at least one site, for example 'sites: {north: {manifest: ...}}'"),
        ("sites: {a: b}", "sites.a: must be a mapping of keys of a site ({} for the defaults alone)"),
        ("sites: {a: {}}\ndefaults: 5", "defaults: must be a mapping of keys of a site"),
        (
            "sites: {a: {manifest: m, modalities: {x: {colum: c}}}}",
            "sites.a.modalities.x: unknown key 'colum'; did you …",
        ),
        (
            "sites: {a: {manifest: ~nobody-here/m, modalities: {x: c}}}",
            "sites.a.manifest: ~nobody-here/m: there is no …",
        ),
    ],
)
def test_a_sites_files_mistakes_name_the_site(tmp_path: Path, text: str, said: str) -> None:
    found = complaint(tmp_path, text, load_sites)
    assert reads(found, said)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("split", {"colum": "fold"}, "split: unknown key 'colum'; did you mean 'column'?"),
        ("split", {"train": 0.7, "val": 0.1}, "split.test: is missing"),
        ("split", {"train": 0.7, "val": 0.1, "test": 0.1}, "split: train, val and test must sum to 1, not 0.9"),
        ("split", {"column": "fold", "train": "a"}, "split.train: must be a list, like [a, b]"),
        ("split", {"train": ["a"], "val": ["a"]}, "split: 'a' cannot mean two splits"),
        ("modalities.note", {"feature": {}}, "modalities.note: unknown key 'feature'; known: column, missing, values"),
        ("modalities.note", 5, "modalities.note: must be a mapping, like {key: value} or {}"),
        (
            "modalities.note",
            {"column": "c", "values": {True: "x"}},
            "modalities.note.values: the key 'True': true and …",
        ),
        ("targets", {"1a": "c"}, "targets: the key '1a': must start with a letter and hold only letters, digits, …"),
        ("missing_files", "no", "missing_files: must be 'error' or 'absent'"),
        ("manifest", 5, "manifest: must be text; put it in quotes"),
    ],
)
def test_a_sites_mistakes_are_said_with_their_place(tmp_path: Path, place: str, value: Any, said: str) -> None:
    found = complaint(tmp_path, edited(SITE, place, value), load_site).splitlines()[0]
    assert reads(found, said)
