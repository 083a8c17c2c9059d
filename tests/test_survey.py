"""`mmfm survey` and how counts leave a site: against pandas and scipy on the manifests, and against brute force."""

import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from command_line import hospitals, mmfm
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats.contingency import association
from tiny import prepare_run, tiny_federation, write_sites

from client import gates
from client.agent import Agent
from mmfm_core.config import Site
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.site import Release
from mmfm_core.protocol import Describe, Metric, RoundReply, RoundRequest, SiteDescription
from server.coordinator import initial_state
from server.strategy import Strategy
from server.survey import ask, differences, findings

FEDERATION = tiny_federation()


def surveyed(folder: Path, **releases: int) -> tuple[dict[str, Site], list[SiteDescription]]:
    sites = {
        name: site.model_copy(update={"release": Release(min_count=releases.get(name, 1))})
        for name, site in write_sites(folder).items()
    }
    return sites, ask(FEDERATION, sites)


def test_exact_counts_are_those_of_the_manifests(tmp_path: Path) -> None:
    sites, described = surveyed(tmp_path)
    for site in described:
        frame = pd.read_csv(sites[site.site].manifest)
        assert site.studies == frame["split"].value_counts().to_dict()
        assert site.patients == frame.groupby("split")["patient_id"].nunique().to_dict()
        columns = {"scan": ["scan"], "note": ["note"], "labs": ["crp", "age"]}
        for modality, counts in site.modalities.items():
            there = frame[frame[columns[modality]].notna().any(axis=1)]
            assert counts == there["split"].value_counts().to_dict()
        for split, counts in site.targets["disease"].items():
            assert counts == frame[frame["split"] == split]["disease"].value_counts().to_dict()


def test_differences_are_scipys(tmp_path: Path) -> None:
    sites, described = surveyed(tmp_path)
    frame = pd.concat(pd.read_csv(site.manifest).assign(site=name) for name, site in sites.items())
    by_name = {each.what: each for each in differences(FEDERATION, described)}
    table = pd.crosstab(frame["site"], frame["disease"])
    assert by_name["disease"].effect == pytest.approx(association(table, correction=False), abs=1e-12)
    table = pd.crosstab(frame["site"], frame["note"].notna())
    assert by_name["modality note"].effect == pytest.approx(association(table, correction=False), abs=1e-12)
    assert by_name["modality note"].shares == pytest.approx(
        frame.groupby("site")["note"].agg(lambda notes: notes.notna().mean()).to_dict()
    )
    assert "modality scan" not in by_name  # one site alone holds it


def test_what_a_consortium_should_know_is_said(tmp_path: Path) -> None:
    _, (north, south) = surveyed(tmp_path)
    told = "\n".join(findings(FEDERATION, [north, south]))
    assert "modality scan: only north holds it" in told
    assert "No two sites hold the same modality" not in told
    described = asdict(south) | {"modalities": {"labs": south.modalities["labs"]}}
    scan_only = asdict(north) | {"modalities": {"scan": north.modalities["scan"]}}
    told = "\n".join(findings(FEDERATION, [SiteDescription(**scan_only), SiteDescription(**described)]))
    assert "modality note: no site holds it" in told
    assert "No two sites hold the same modality" in told
    shifted = asdict(south) | {"targets": {"disease": {s: {"healthy": 2, "ill": 40} for s in ("train", "val", "test")}}}
    told = "\n".join(findings(FEDERATION, [north, SiteDescription(**shifted)]))
    assert re.search(r"disease '\w+': .* at south.*more than chance explains", told)
    one = asdict(south) | {"patients": south.patients | {"val": 1}}
    assert "south: fewer than 2 validation patients" in "\n".join(findings(FEDERATION, [SiteDescription(**one)]))


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 50))
def test_a_told_count_is_near_and_in_order_and_never_small(one: int, other: int, least: int) -> None:
    told = Release(min_count=least).count
    assert told(one) == 0 if one == 0 else told(one) >= least
    assert told(one) % least == 0
    assert one <= told(one) < one + least
    assert (told(one) <= told(other)) or one > other


@pytest.mark.parametrize(("least", "parts"), [(3, 2), (4, 2), (5, 2), (4, 3), (5, 3)])
def test_no_small_part_shows_as_the_difference_of_a_total_and_the_others(least: int, parts: int) -> None:
    """What all tables with these told parts and total have in common: of two parts nothing, of three no exact size."""
    told = Release(min_count=least).count
    possible: dict[tuple[int, ...], set[int]] = {}
    for counts in itertools.product(range(1, 3 * least + 1), repeat=parts):
        possible.setdefault((told(sum(counts)), *map(told, counts)), set()).add(counts[0])
    for first in possible.values():
        if min(first) <= least:
            assert len(first) > 1 if parts > 2 else first >= set(range(1, least))


def test_the_least_count_is_one() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Release(min_count=0)


def test_a_figure_over_few_studies_is_not_told() -> None:
    few, many = (Metric("disease", "shared", "test", "auroc", 0.75, n, 0.5, 1.0) for n in (4, 12))
    hidden, told = gates.measured([few, many], Release())
    assert (hidden.value, hidden.low, hidden.high, hidden.n) == (None, None, None, 5)
    assert (told.value, told.low, told.high, told.n) == (0.75, 0.5, 1.0, 15)


def counts_in(value: Any, key: str = "") -> list[float]:
    """Every count of a message, by the names they have."""
    if isinstance(value, dict):
        return [count for inner, each in value.items() for count in counts_in(each, inner)]
    if isinstance(value, list):
        return [count for each in value for count in counts_in(each, key)]
    return [value] if isinstance(value, int | float) and key not in NO_COUNTS else []


NO_COUNTS = {"round", "seconds", "loss", "value", "low", "high", "min_count"}


def test_nothing_that_an_agent_sends_counts_more_finely_than_its_policy(tmp_path: Path) -> None:
    """At a site that says nothing of `release`, over all rounds."""
    sites = {name: site.model_copy(update={"release": Release()}) for name, site in write_sites(tmp_path).items()}
    federation = FEDERATION
    run = prepare_run(tmp_path / "run", federation, sites)
    document = sha256(federation)
    shared = initial_state(federation)
    for name in sites:
        agent = Agent.open(run / "sites" / name)
        description = agent.answer(Describe(document))
        assert isinstance(description, SiteDescription)
        strategy = Strategy(federation, shared)
        said: list[Any] = [description]
        for this in agent.participate(document).rounds:
            tensors = {n: shared[n] for n in strategy.tensors_for(description, this)}
            reply = agent.answer(RoundRequest(document, this.number, tensors))
            assert isinstance(reply, RoundReply), reply
            strategy.fold(reply, description, this)  # a coordinator takes rounded weights
            said.append(reply)
        counts = [count for message in said for count in counts_in(asdict(message) | {"tensors": {}})]
        assert len(counts) > 30
        assert {count % 5 for count in counts} == {0}


def test_the_command_prints_and_writes_what_sites_tell(tmp_path: Path) -> None:
    documents = hospitals(tmp_path)
    content = yaml.safe_load(documents.sites.read_text())
    content["sites"]["south"].pop("release")
    documents.sites.write_text(yaml.safe_dump(content, sort_keys=False))
    done = mmfm(tmp_path, "survey", documents.federation, "--json", tmp_path / "survey.json")
    assert done.returncode == 0, done.stderr
    assert "rounded up to multiples of 5 by south" in " ".join(done.stdout.split())
    written = json.loads((tmp_path / "survey.json").read_text())
    assert [site["site"] for site in written["sites"]] == ["north", "south", "healthy"]
    assert [site["min_count"] for site in written["sites"]] == [1, 5, 1]
    assert any("all its training labels of 'disease' are 'healthy'" in sentence for sentence in written["findings"])
    assert not (tmp_path / "runs").exists()


def test_a_sites_file_without_a_word_on_it_tells_counts_in_fives(tmp_path: Path) -> None:
    site = next(iter(write_sites(tmp_path).values()))
    content = {key: value for key, value in yaml.safe_load(dump(site)).items() if key != "release"}
    assert Site.model_validate(content).release.min_count == 5
