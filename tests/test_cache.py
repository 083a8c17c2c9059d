"""What a site derived from its patients goes when nothing used it for long, and not before."""

import logging
import os
import time
from pathlib import Path

import pytest
from test_features import build, everything_of, frozen_trunks, read

from mmfm_core.data.cache import KEPT_DAYS, sweep
from mmfm_core.data.features import with_features

DAY = 24 * 60 * 60


def aged(path: Path, days: float, content: bytes = b"pixels") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return older(path, days)


def older(path: Path, days: float) -> Path:
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_only_what_was_not_used_for_long_goes_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    old = [aged(tmp_path / name, KEPT_DAYS + 1) for name in ("images/a.npy", "abc/b.safetensors")]
    recent = [aged(tmp_path / name, KEPT_DAYS - 1) for name in ("images/c.npy", "abc/d.safetensors")]
    lock = aged(tmp_path / "images" / "lock", 1000)  # somebody may hold it
    sweep(tmp_path)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*recent, lock])
    assert caplog.text.count("2 files") == 1


def test_a_cache_that_is_not_there_yet_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    sweep(tmp_path / "cache")
    assert not caplog.text
    assert not (tmp_path / "cache").exists()


def test_features_that_a_run_reads_stay_and_those_of_another_trunk_go(tmp_path: Path):
    federation, cache = frozen_trunks(), tmp_path / "cache"
    dataset = read(tmp_path, federation)

    def run(seed: int) -> None:
        model = build(federation, dataset, seed)
        with_features(dataset, model, federation.model, everything_of(model, "scan"), cache)

    run(seed=0)
    mine = set(cache.rglob("*.safetensors"))
    run(seed=1)
    for path in cache.rglob("*.safetensors"):
        older(path, KEPT_DAYS + 1)
    run(seed=0)
    sweep(cache)
    assert set(cache.rglob("*.safetensors")) == mine
