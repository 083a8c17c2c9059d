"""Simulated sites that share what costs memory answer as each would alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny import MODALITIES, prepare_run, tiny_federation, write_sites

from client.agent import Agent
from client.simulated import site_directories
from mmfm_core.config.loading import sha256
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.parameters import fates_of, held
from mmfm_core.protocol import RoundReply, RoundRequest
from server.coordinator import initial_state
from server.engines.hospitals import Hospitals, shared_models


def test_sites_that_share_a_model_and_give_back_their_data_answer_as_if_alone(tmp_path: Path) -> None:
    """Two rounds at sites with the same parts, in turn, with a fusion of their own each."""
    federation = tiny_federation(parameters={"local": ["fusion.*"]})
    document, state = sha256(federation), initial_state(federation)
    shared = {name: state[name] for name in held(fates_of(federation, state), "shared")}
    sites = write_sites(tmp_path / "data", {"north": MODALITIES, "south": MODALITIES}, patients=12)
    built: list[MultimodalModel] = []
    sharing = shared_models()

    def build(*parts: object) -> MultimodalModel:
        built.append(sharing(*parts))  # type: ignore[arg-type]
        return built[-1]

    answers = []
    for name, way, at_once in (("alone", MultimodalModel, 2), ("together", build, 1)):
        run = prepare_run(tmp_path / name, federation, sites)
        agents = [Agent.open(folder, durable=False, build=way) for folder in site_directories(run / "sites")]
        hospitals = Hospitals(agents, at_once)
        hospitals.participate(document)
        questions = [(site, RoundRequest(document, number, shared)) for number in (1, 2) for site in range(len(sites))]
        answers.append([hospitals.ask(site)(question) for site, question in questions])
    assert len(built) > len(sites)  # a site that gave its data back loads it again
    assert len({id(model) for model in built}) == 1
    for one, other in zip(*answers, strict=True):
        assert isinstance(one, RoundReply)
        assert isinstance(other, RoundReply)
        assert replace(one, seconds=0, tensors={}) == replace(other, seconds=0, tensors={})
        assert one.tensors.keys() == other.tensors.keys()
        assert all(np.array_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
