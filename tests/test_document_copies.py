"""Documents against anything: a copy is the same document, and what is none is refused in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tiny import tiny_federation

from mmfm_core.config import Federation, Site, load_federation, load_site, load_sites
from mmfm_core.config.loading import dump, sha256
from mmfm_core.errors import MmfmError

SITE = {"name": "north", "manifest": "m.csv", "modalities": {"note": "note"}}

# What YAML 1.1, 1.2 or PyYAML take for something else than text, or break lines at.
ODD = [
    *("no", "yes", "on", "true", "~", "=", "<<", "1e-3", "1.0e3", "-.5", "0o7", "010", "0x1F", "1_000", "12:30", "0b_"),
    *("2001-02-03", ".inf", ".nan", "é\u2028x", "\x85", "\ufeffa", "a: b", "- a", "# a", "!!int a", "'", '"', "a\nb"),
]

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

FRAGMENTS = [
    *(
        "name",
        "sites",
        ": ",
        "\n",
        "  ",
        "- ",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "'",
        '"',
        "|",
        ">",
        "&a ",
        "*a",
        "<<",
        "~",
        "---\n",
    ),
    *(
        "!!int ",
        "!!bool ",
        "!!float ",
        "!!timestamp ",
        "!!map ",
        "!!set ",
        "!!binary ",
        "!x ",
        "0b_",
        "2001-99-99",
        "${",
        "}",
        "\t",
    ),
]
yamlish = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)
anything = st.binary(max_size=200) | st.text(max_size=100) | yamlish | yamlish.map("name: {}".format)


@given(data=anything)
@settings(in_one_folder, max_examples=400)
def test_any_bytes_give_a_document_or_a_sentence(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "document.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    for load in (load_federation, load_site, load_sites):
        with pytest.raises(MmfmError):  # none of these can be whole by chance
            load(path)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def places_of(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    if not isinstance(document, dict | list):
        return []
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    return [place for key, value in inner for place in ((*prefix, key), *places_of(value, (*prefix, key)))]


def loadable(load: Callable[[Path], object], path: Path) -> bool:
    try:
        load(path)
    except MmfmError:
        return False
    return True


@given(data=st.data())
@settings(in_one_folder, max_examples=150)
def test_a_document_with_anything_anywhere_loads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = {"federation": tiny_federation().model_dump(mode="json"), "site": SITE | {"split": "split"}}
    kind = data.draw(st.sampled_from(sorted(whole)))
    document: Any = yaml.safe_load(yaml.safe_dump(whole[kind]))
    *way, last = data.draw(st.sampled_from(places_of(document)))
    inner = document
    for part in way:
        inner = inner[part]
    inner[last] = data.draw(nested)
    path = tmp_path / "document.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    loadable(load_federation if kind == "federation" else load_site, path)


names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,6}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
# '${…}' is for the environment wherever it stands; the rest are words that would be read as missing cells.
words = texts.map(str.strip).filter(
    lambda text: "${" not in text and text not in ("", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "?")
)
odd_words = st.sampled_from(ODD)
choices = st.lists(words | odd_words, min_size=2, max_size=4, unique=True)
positive = st.floats(1e-9, 1e9, allow_subnormal=False)
normalizations = st.just("site") | st.fixed_dictionaries({"mean": st.floats(-1e9, 1e9), "std": positive})
features = st.dictionaries(
    names,
    st.fixed_dictionaries({}, optional={"normalize": normalizations}) | choices.map(lambda c: {"categories": c}),
    min_size=1,
    max_size=3,
)
modalities = st.dictionaries(
    names,
    st.one_of(
        st.tuples(
            st.fixed_dictionaries({"kind": st.just("image2d"), "size": st.just([16, 8]), "normalize": normalizations}),
            st.just({"type": "vit"}),
        ),
        st.tuples(st.just({"kind": "text", "max_length": 9, "optional": True}), st.just({"type": "bert", "depth": 1})),
        st.tuples(
            st.fixed_dictionaries({"kind": st.just("tabular"), "features": features}),
            st.just({"type": "feature_tokens"}),
        ),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def federations(draw: st.DrawFn) -> Federation:
    drawn, heads = draw(modalities), draw(st.dictionaries(names, choices, min_size=1, max_size=2))
    stage = st.fixed_dictionaries(
        {
            "tasks": st.lists(st.sampled_from(sorted(heads)), min_size=1).map(
                lambda tasks: {task: {} for task in tasks}
            ),
            "train": st.lists(texts.filter(lambda text: "${" not in text), min_size=1, max_size=2),
            "optimizer": st.fixed_dictionaries({"lr": positive}),
        }
    )
    stages = draw(st.lists(stage, min_size=1, max_size=3))
    return Federation.model_validate(
        {
            "name": draw(names),
            "seed": draw(st.integers(0, 2**70)),
            "model": {
                "dim": 12,
                "modalities": {name: modality for name, (modality, _) in drawn.items()},
                "encoders": {name: encoder for name, (_, encoder) in drawn.items()},
                "fusion": {"type": draw(st.sampled_from(["gated", "joint", "concat"]))},
                "heads": {name: {"type": "classification", "classes": classes} for name, classes in heads.items()},
            },
            "stages": [stage | {"name": f"s{number}"} for number, stage in enumerate(stages)],
        }
    )


def assert_survives(document: BaseModel, load: Callable[[Path], BaseModel], path: Path) -> None:
    path.write_text(dump(document), encoding="utf-8")
    again = load(path)
    assert again == document
    assert sha256(again) == sha256(document)


@given(federation=federations())
@settings(in_one_folder, max_examples=80)
def test_a_documents_copy_is_the_same_document(tmp_path: Path, federation: Federation) -> None:
    assert_survives(federation, load_federation, tmp_path / "federation.yaml")


@given(
    values=st.dictionaries(words | odd_words, words | odd_words, max_size=3), missing=st.lists(odd_words, max_size=3)
)
@settings(in_one_folder, max_examples=60)
def test_a_sites_copy_is_the_same_site(tmp_path: Path, values: dict[str, str], missing: list[str]) -> None:
    column = {"column": "ill", "values": values, "missing": missing}
    manifest = str((tmp_path / "m.csv").resolve())
    site = Site.model_validate(SITE | {"manifest": manifest, "targets": {"disease": column}, "missing": missing})
    assert_survives(site, load_site, tmp_path / "site.yaml")


def test_a_changed_default_changes_the_hash() -> None:
    federation = tiny_federation()
    assert sha256(tiny_federation()) == sha256(federation)
    assert sha256(federation.model_copy(update={"seed": 1})) != sha256(federation)
    assert "optimizer" in dump(federation), "defaults are written out: a site approves them too"
