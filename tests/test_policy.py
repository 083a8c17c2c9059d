"""The parameter policy, and the rounds that a document means, against their definitions."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_federation

from mmfm_core.config.federation import Parameters
from mmfm_core.config.privacy import Privacy
from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import check_patterns, fates_of

NAMES = ["encoders.scan.a", "encoders.scan.b", "encoders.note.a", "fusion.a", "fusion.b", "heads.disease.w"]
patterns = st.lists(
    st.sampled_from([*NAMES, "*", "encoders.*", "encoders.scan.*", "*.a", "fusion.?", "heads.[dx]*", "nothing"]),
    max_size=3,
)


@given(shared=patterns, local=patterns, frozen=patterns)
@settings(deadline=None)
def test_frozen_comes_before_local_before_shared(shared: list[str], local: list[str], frozen: list[str]) -> None:
    federation = tiny_federation(parameters={"shared": shared, "local": local, "frozen": frozen})
    expected: dict[str, str] = {}
    for name in NAMES:
        for fate, listed in (
            ("shared", shared),
            ("local", local),
            ("frozen", frozen),
        ):  # the last one to claim it has it
            for pattern in listed:
                if fnmatchcase(name, pattern):
                    expected[name] = fate
    unclaimed = [name for name in NAMES if name not in expected]
    if unclaimed:
        with pytest.raises(MmfmError, match=f"'{unclaimed[0]}' matches no pattern"):
            fates_of(federation, NAMES)
    else:
        assert fates_of(federation, NAMES) == expected
        if "nothing" in [*shared, *local, *frozen]:
            with pytest.raises(MmfmError, match="'nothing' matches no parameter"):
                check_patterns(federation, NAMES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parameters": {"local": ["fusions.*"]}},
            "parameters.local: the pattern 'fusions.*' matches no parameter; did you mean 'fusion.*'?",
        ),
        (
            {"parameters": {"shared": ["encoders.*"]}},
            "parameters: 'fusion.a' matches no pattern, so it has no fate; add it to shared, local or frozen",
        ),
    ],
)
def test_a_pattern_that_does_nothing_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MmfmError) as error:
        check_patterns(tiny_federation(**changes), NAMES)
    assert str(error.value) == said


def test_a_stages_patterns_are_checked_too() -> None:
    stages = [stage.model_dump(mode="json") for stage in tiny_federation().stages]
    stages[1]["train"] = ["heads.diseases.*"]
    with pytest.raises(
        MmfmError, match=r"stages\.1\.train: the pattern 'heads\.diseases\.\*' matches no parameter; did you"
    ):
        check_patterns(tiny_federation(stages=stages), NAMES)
    assert Parameters().shared == ("*",), "by default everything is shared"


def test_patterns_of_what_is_shrunk_are_checked_too() -> None:
    privacy = Privacy(epsilon=8, delta=1e-5, rate=1, shrink=("heads.diseases.*",))
    with pytest.raises(
        MmfmError, match=r"privacy\.shrink: the pattern 'heads\.diseases\.\*' matches no parameter; did"
    ):
        check_patterns(tiny_federation().model_copy(update={"privacy": privacy}), NAMES)


@pytest.mark.parametrize(
    ("federated", "expected"),
    [
        ([3], [["val"]] * 3 + [["val", "test"]]),
        ([2, 1, None], [["val"]] * 3 + [["val", "test"]]),
        ([1, None, None], [["val"], ["val", "test"], []]),
        ([None], [["val", "test"]]),
    ],
)
def test_the_test_split_is_looked_at_once_after_the_last_upload(
    federated: list[int | None], expected: list[Any]
) -> None:
    stages = [
        {"name": f"s{i}", "tasks": {"disease": {}}, "federated": rounds is not None, "rounds": rounds or 1}
        for i, rounds in enumerate(federated)
    ]
    rounds = rounds_of(tiny_federation(stages=stages))
    assert [list(this.evaluates) for this in rounds] == expected
    assert [this.number for this in rounds] == list(range(1, len(expected) + 1))
    assert [this.returns_tensors for this in rounds] == [
        stage["federated"] for stage in stages for _ in range(stage["rounds"])
    ] + [False] * (len(rounds) - sum(stage["rounds"] for stage in stages))
