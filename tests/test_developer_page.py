"""The README's example of a new part is a whole one: saved and registered as it says, it works."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_federation, write_sites

from mmfm_core import registry
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import load_dataset
from mmfm_core.models.model import MultimodalModel

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_one_file_and_one_line_make_a_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = README.split("## For a developer")[1]
    file, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    name, place = re.fullmatch(r'"(\w+)": "([\w.:]+)",\n', line).groups()
    module, _, config = place.partition(":")
    assert f"`{module.replace('.', '/')}.py`" in page
    (tmp_path / "part_of_the_readme.py").write_text(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.FUSIONS, name, f"part_of_the_readme:{config}")

    document = tiny_federation().model.model_dump(mode="json")
    model = Model.model_validate(document | {"fusion": {"type": name, "modality_dropout": 0.3}})
    site = write_sites(tmp_path / "sites")["north"]
    dataset = load_dataset(site, model)
    built = MultimodalModel(model, dataset.everything.inputs, dataset.everything.targets, seed=0)
    optimizer = torch.optim.AdamW(built.parameters(), lr=0.01)
    batch = dataset.batch(dataset.rows("train", ["disease"]))
    losses = []
    for _ in range(30):
        loss = built.losses(batch, ["disease"])["disease"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
