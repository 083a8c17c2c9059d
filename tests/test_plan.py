"""`mmfm plan`: every number against an independent count, and against what a run records."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from tiny import MODALITIES, tiny_federation, write_sites

from mmfm_core.config import Federation, Site, load_federation
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.site import SplitFractions
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel
from server.apart import check_apart
from server.engines import in_process
from server.plan import show_plan
from server.record import read_lines
from server.simulation import prepare

SITES = {"north": MODALITIES, "south": ("note", "labs"), "unlabelled": ("labs",)}
TRAIN = ["encoders.scan.*", "encoders.note.*", "fusion.*", "heads.*"]

POLICY: dict[str, Any] = {
    "stages": [
        {"name": "warm", "rounds": 2, "local_steps": 2, "batch_size": 8, "tasks": {"disease": {}}},
        {"name": "train", "rounds": 3, "local_steps": 2, "batch_size": 8, "tasks": {"disease": {}}, "train": TRAIN},
        {"name": "adapt", "federated": False, "local_steps": 2, "batch_size": 8, "tasks": {"disease": {}}},
    ],
    "parameters": {"local": ["fusion.*"], "frozen": ["encoders.note.*embeddings*"]},
}


@dataclass(frozen=True)
class Planned:
    """A plan as it was printed, and what it was made for."""

    federation: Federation
    sites: dict[str, Site]
    text: str

    def rows(self, title: str) -> list[list[str]]:
        """The cells of the table under a title."""
        lines = self.text.splitlines()
        begin = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
        rows = []
        for line in lines[begin:]:
            if not line.startswith(tuple("┏┃┡│├└")):
                break
            if line.startswith("│"):
                rows.append([cell.strip() for cell in line.strip("│").split("│")])
        return rows


def plan_of(folder: Path, federation: Federation, sites: dict[str, Site]) -> str:
    (folder / "tiny.yaml").write_text(dump(federation))
    entries = {name: yaml.safe_load(dump(site)) | {"name": None} for name, site in sites.items()}
    for entry in entries.values():
        del entry["name"]
    (folder / "tiny.sites.yaml").write_text(yaml.safe_dump({"sites": entries}))
    said = StringIO()
    show_plan(folder / "tiny.yaml", folder / "tiny.sites.yaml", Console(file=said, width=160))
    return said.getvalue()


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("plan")
    federation, sites = tiny_federation(**POLICY), write_sites(folder / "hospitals", SITES)
    sites["unlabelled"] = sites["unlabelled"].model_copy(update={"targets": {}})
    return Planned(federation, sites, plan_of(folder, federation, sites))


def tensors_of(federation: Federation, site: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """A site's model (or the full one), built as a site builds it."""
    held = SITES[site] if site else MODALITIES
    heads = [] if site == "unlabelled" else list(federation.model.heads)
    yield from MultimodalModel(federation.model, held, heads, federation.seed).state_dict().items()


def fate(name: str) -> str:
    if fnmatchcase(name, "encoders.note.*embeddings*"):
        return "frozen"
    return "local" if name.startswith("fusion.") else "shared"


def test_parameters_and_their_fates_are_counted_as_torch_counts_them(planned: Planned) -> None:
    expected: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors_of(planned.federation):
        block = "fusion" if name.startswith("fusion.") else ".".join(name.split(".")[:2])
        for key in ((block, fate(name)), ("total", fate(name))):
            size = expected.setdefault(key, [0, 0])
            size[0] += tensor.numel()
            size[1] += tensor.numel() * tensor.element_size()
    rows = planned.rows("Parameters")
    assert {(block, kept): [number, mb] for block, kept, number, mb in rows} == {
        key: [f"{number:,}", f"{size / 1e6:.3f}"] for key, (number, size) in expected.items()
    }
    parameters = sum(
        p.numel() for p in MultimodalModel(planned.federation.model, MODALITIES, ["disease"], 0).parameters()
    )
    assert sum(int(row[2].replace(",", "")) for row in rows if row[0] == "total") == parameters  # there are no buffers


def test_traffic_is_what_a_run_then_sends(planned: Planned, tmp_path: Path) -> None:
    down, up = {}, {}
    for site in SITES:
        sizes = {
            n: t.numel() * t.element_size() for n, t in tensors_of(planned.federation, site) if fate(n) == "shared"
        }
        down[site] = sum(sizes.values())
        train = sum(size for name, size in sizes.items() if any(fnmatchcase(name, pattern) for pattern in TRAIN))
        up[site] = [down[site], down[site], train, train, train, 0]
    silent = "unlabelled"  # it has nothing to train on, so it is not asked
    printed = {row[0]: row[1:] for row in planned.rows("Traffic")}
    for site in ("north", "south"):
        values = (down[site], max(up[site]), 6 * down[site], sum(up[site]))
        assert printed[site] == [f"{value / 1e6:.3f}" for value in values]
    assert [float(value) for value in printed[silent][1:]] == [0, 0, 0]

    run = prepare(tmp_path / "run", planned.federation, planned.sites)
    in_process.simulate(run.directory)
    recorded = pd.DataFrame(read_lines(run.metrics)).query("site == 'federation'")
    assert recorded.query("metric == 'bytes_down'")["value"].tolist() == [down["north"] + down["south"]] * 6
    assert recorded.query("metric == 'bytes_up'")["value"].tolist() == [
        sum(pair) for pair in zip(up["north"], up["south"], strict=True)
    ]


def test_sites_are_counted_as_their_manifests_say(planned: Planned) -> None:
    labels = {row[0]: row[1] for row in planned.rows("Training labels")}
    for site, patients, train, val, test, *shares in planned.rows("Sites"):
        table = pd.read_csv(planned.sites[site].manifest)
        columns = {"scan": "scan", "note": "note", "labs": "crp"}
        here = {name: table[columns[name]].notna() & (name in SITES[site]) for name in MODALITIES}
        something = here["scan"] | here["note"] | here["labs"]  # a study that has nothing is none
        table = table[something]
        assert int(patients) == table["patient_id"].nunique()
        assert [int(train), int(val), int(test)] == [sum(table["split"] == split) for split in ("train", "val", "test")]
        assert shares == [f"{here[name].sum() / len(table):.0%}" for name in MODALITIES]
        counts = table[table["split"] == "train"]["disease"].value_counts()
        told = f"{counts['healthy']} healthy, {counts['ill']} ill"
        assert labels[site] == ("–" if site == "unlabelled" else told)


def test_the_document_is_named_by_its_hash_and_its_stages_are_shown(planned: Planned) -> None:
    assert planned.text.splitlines()[0] == f"tiny  document sha256 {sha256(planned.federation)}"
    stages = planned.rows("Stages")
    assert [row[:4] for row in stages] == [
        ["warm", "all sites together", "2", "2 of 8 studies"],
        ["train", "all sites together", "3", "2 of 8 studies"],
        ["adapt", "each site for itself", "1", "2 of 8 studies"],
    ]
    assert stages[1][5] == ", ".join(TRAIN)
    assert re.search(r"^6 rounds\. Estimated on this machine: [\d.]+ (s|min|h)", planned.text, re.MULTILINE)


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    federation = tiny_federation()
    model = federation.model.model_dump()
    model["heads"]["disease"]["classes"] = ["healthy", "ill [red]"]
    stages = [{"name": "train", "tasks": {"disease": {}}, "train": ["*[sn]*"]}]
    sites = write_sites(tmp_path / "hospitals")
    column = {"column": "disease", "values": {"ill": "ill [red]"}}
    sites = {
        name: Site.model_validate(site.model_dump() | {"targets": {"disease": column}}) for name, site in sites.items()
    }
    text = plan_of(tmp_path, tiny_federation(model=model, stages=stages), sites)
    assert "8 healthy, 8 ill [red]" in text
    assert "*[sn]*" in text


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern that matches nothing": ({"parameters": {"local": ["fuson.*"]}}, r"parameters\.local: .*did you mean"),
    "a name without a fate": ({"parameters": {"shared": ["heads.*"]}}, r"parameters: 'encoders.*has no fate"),
}


@pytest.mark.parametrize(("change", "told"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_run_would_stumble_over_is_said_before(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match=told):
        plan_of(tmp_path, tiny_federation(**change), write_sites(tmp_path / "hospitals"))


def test_what_no_site_holds_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match=r"model\.modalities\.scan: no site holds it"):
        plan_of(
            tmp_path, tiny_federation(), write_sites(tmp_path / "a", {"north": ("note", "labs"), "south": ("labs",)})
        )
    sites = {n: s.model_copy(update={"targets": {}}) for n, s in write_sites(tmp_path / "b").items()}
    with pytest.raises(MmfmError, match=r"stages\.0\.tasks\.disease: no site has a training label"):
        plan_of(tmp_path, tiny_federation(), sites)
    sites = write_sites(tmp_path / "c")
    sites["north"].manifest.unlink()
    with pytest.raises(MmfmError, match=r"north/manifest\.csv: the manifest does not exist"):
        plan_of(tmp_path, tiny_federation(), sites)


def test_patients_who_train_at_one_site_are_not_measured_at_another(tmp_path: Path) -> None:
    """Sites that are cut from one manifest: by shares that overlap, and with splits of their own."""
    whole = write_sites(tmp_path / "hospitals")["north"]
    fractions = SplitFractions(train=0.5, val=0.2, test=0.3)

    def cut(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Site]:
        return {n: whole.model_copy(update={"name": n} | c) for n, c in (("one", first), ("two", second))}

    check_apart(cut({"share": (0.0, 0.6)}, {"share": (0.5, 1.0)}), "sites.yaml")  # the same split at both
    check_apart(cut({"share": (0.0, 0.5), "split": fractions}, {"share": (0.5, 1.0)}), "sites.yaml")
    overlapping = cut({"share": (0.0, 0.6), "split": fractions}, {"share": (0.2, 1.0)})
    with pytest.raises(MmfmError, match=r"^sites\.yaml: sites\.one, sites\.two: \d+ of their patients train at one"):
        check_apart(overlapping, "sites.yaml")
    with pytest.raises(MmfmError, match="patients it has seen"):
        plan_of(tmp_path, tiny_federation(), overlapping)


def test_too_few_sites_with_something_to_train_on_is_said_before(tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "hospitals")
    rows = pd.read_csv(sites["south"].manifest, dtype=str)
    rows.assign(split="test").to_csv(sites["south"].manifest, index=False)
    federation = tiny_federation(aggregation={"min_sites": 2})
    with pytest.raises(MmfmError, match=r"stages\.0: no training study for it at south, .*aggregation\.min_sites, 2"):
        plan_of(tmp_path, federation, {name: sites[name] for name in ("north", "south")})


def test_a_plan_writes_nothing(planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = planned.sites["north"].manifest.parents[2]
    before = sorted(folder.rglob("*"))
    show_plan(folder / "tiny.yaml", folder / "tiny.sites.yaml", Console(file=StringIO()))
    assert load_federation(folder / "tiny.yaml") == planned.federation
    assert sorted(folder.rglob("*")) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_torch_is_told_to_take_one_thread_before_it_is_imported(verb: str, planned: Planned, tmp_path: Path) -> None:
    """On a busy machine the threads of a tiny step wait for each other: a plan of seconds once promised an hour."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name in ("torch", "server.workers"):
            sys.exit("threads: " + os.environ.get("OMP_NUM_THREADS", "all"))
sys.meta_path.insert(0, Watch())
from mmfm_core.command import main
main()
"""
    document = planned.sites["north"].manifest.parents[2] / "tiny.yaml"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    said = subprocess.run(
        [sys.executable, "-c", code, verb, document],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stderr == "threads: 1\n"
