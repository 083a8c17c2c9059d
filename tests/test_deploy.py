"""The files of `deploy/` against the code that they start, and against what they promise."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from client.place import Place
from mmfm_core import command
from server.consortium import services
from server.consortium.founding import found

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
NO_SECOND_LOCATION = re.compile(r"location [^{]*\{[^}]*\}")


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """The sections of a unit, each key with all its values."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return sections


def assert_mmfm_knows(words: list[str]) -> None:
    """The words are a command of `mmfm`, with options that it has."""
    here: Any = typer.main.get_command(command.build())
    while words and not words[0].startswith("-") and hasattr(here, "commands"):
        here = here.commands[words.pop(0)]
    here.make_parser(typer.Context(here)).parse_args(list(words))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists_and_survives_long_outages(path: Path) -> None:
    sections = unit(path)
    (start,) = sections["Service"]["ExecStart"]
    program, *words = shlex.split(start)
    assert program == "/opt/mmfm/bin/mmfm"
    assert_mmfm_knows(words)
    assert sections["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert sections["Service"]["Restart"] == ["always"]
    assert sections["Service"]["NoNewPrivileges"] == ["yes"]


@pytest.mark.parametrize("name", ["mmfm-agent", "mmfm-relay"])
def test_commands_look_for_the_agent_where_the_units_have_it(name: str) -> None:
    words = shlex.split(unit(DEPLOY / "systemd" / f"{name}.service")["Service"]["ExecStart"][0])
    place = Place.of(Path("/var/lib/mmfm"))
    assert words[words.index("--socket") + 1] == str(place.socket)
    assert "--directory" not in words or words[words.index("--directory") + 1] == str(place.directory)


def test_every_program_of_the_coordinator_has_a_unit_and_a_container(tmp_path: Path) -> None:
    programs = set(services.commands(found(tmp_path / "c", "trial", "127.0.0.1"))) | {"door"}
    started = {
        unit(path)["Service"]["ExecStart"][0].rpartition("serve ")[2]
        for path in UNITS
        if "coordinator serve" in path.read_text()
    }
    assert started == programs
    containers = compose("coordinator.yaml")
    assert containers.keys() == programs
    for name, container in containers.items():
        assert container["command"] == ["coordinator", "serve", name]
        assert_mmfm_knows(list(container["command"]))
    assert [name for name, container in containers.items() if "ports" in container] == ["superlink"]


def test_what_sees_patients_has_no_network_and_what_has_it_sees_none() -> None:
    containers = compose("site.yaml")
    for container in containers.values():
        assert_mmfm_knows(list(container["command"]))
    agent, relay = containers["agent"], containers["relay"]
    assert agent["network_mode"] == "none"
    assert "ports" not in agent
    shared = {volume.split(":")[0] for volume in agent["volumes"]} & {
        volume.split(":")[0] for volume in relay["volumes"]
    }
    assert shared == {"./socket"}
    assert agent["user"].split(":")[0] != relay["user"].split(":")[0]


def test_an_nginx_of_ones_own_has_the_doors_rules() -> None:
    def rules(text: str) -> list[str]:
        return [
            " ".join(rule.split()) for rule in NO_SECOND_LOCATION.findall(text.replace("{{", "{").replace("}}", "}"))
        ]

    own, made = (DEPLOY / "nginx.conf").read_text(), services.DOOR
    filled = made.replace("{link}", "127.0.0.1:8000").replace(
        "{authority}", "/var/lib/mmfm/coordinator/certificates/ca.crt"
    )
    assert rules(own) == rules(filled)
    assert len(rules(own)) == 4


def compose(name: str) -> dict[str, Any]:
    services_of: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / name).read_text())["services"]
    return services_of
