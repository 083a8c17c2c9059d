"""What a site's training step spends its time on, in every example federation: how much of it is the model.

    OMP_NUM_THREADS=1 python benchmarks/steps.py [--only nuclei heart]

The first site of each document, its real data, a few steps of each stage after as many that warm up. CPU seconds of
this process. Writes `benchmarks/results/steps.md`. What needs another program first (public weights, a vocabulary, the
pairs of registration) is left out where that was not run, and said.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from client.loading import initial
from mmfm_core.artifacts import collect
from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Dataset, load_dataset
from mmfm_core.data.features import with_features
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel, seeded
from mmfm_core.models.parameters import fates_of, held, matches
from mmfm_core.process import keep_memory
from mmfm_core.training.steps import train
from server.simulation import load_documents

FEDERATIONS = Path(__file__).parent.parent / "deploy" / "federations"
RESULTS = Path(__file__).parent / "results" / "steps.md"
STEPS = 6
PARTS = {
    "forward": [(MultimodalModel, "losses")],
    "backward": [(torch.Tensor, "backward")],
    "optimiser": [(torch.optim.AdamW, "step"), (torch.optim.SGD, "step")],
    "batch": [(Dataset, "batch")],
}
HEADER = """# What a training step is made of

`OMP_NUM_THREADS=1 python benchmarks/steps.py`: CPU time of one step at the first site of every example, and its parts:
forward and backward are the model's, a batch is gathered from what was decoded before; the rest is everything else.
The last column is the same step with `precision: bfloat16`, in times that of float32, on a processor with {processor}.

| federation | stage | ms a step | forward | backward | optimiser | batch | rest | bfloat16 |
|---|---|---|---|---|---|---|---|---|"""


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Inside, the CPU seconds of each of `PARTS` are added up."""
    before = [(owner, name, getattr(owner, name)) for each in PARTS.values() for owner, name in each]

    def clocked(part: str, call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - begun

        return called

    for part, each in PARTS.items():
        for owner, name in each:
            setattr(owner, name, clocked(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def measured(name: str, cache: Path) -> list[str]:
    """The lines of one example."""
    federation, sites = load_documents(FEDERATIONS / f"{name}.yaml", FEDERATIONS / f"{name}.sites.yaml")
    artifacts = cache / "artifacts"
    collect(federation.model, FEDERATIONS, artifacts)
    dataset = load_dataset(next(iter(sites.values())), federation.model, artifacts)
    here = dataset.everything
    model = MultimodalModel(federation.model, here.inputs, here.targets, federation.seed, artifacts)
    fates = fates_of(federation, initial(model))
    dataset = with_features(dataset, model, federation.model, held(fates, "frozen"), cache)
    lines = []
    for stage in federation.stages:
        if stage.tasks.keys().isdisjoint([*model.heads, *model.objectives]):
            continue
        trained = [each for each, fate in fates.items() if fate != "frozen" and matches(each, stage.train)]
        lines.append(line_of(name, model, dataset, stage.model_copy(update={"local_steps": STEPS}), trained))
        print(lines[-1], flush=True)
    return lines


def line_of(name: str, model: MultimodalModel, dataset: Dataset, stage: Stage, trained: list[str]) -> str:
    """One line of the table."""
    totals: dict[torch.dtype, float] = {}
    for precision in (torch.bfloat16, torch.float32):
        model.precision = precision
        spent: dict[str, float] = defaultdict(float)
        for _ in range(2):  # the first time warms up
            spent.clear()
            with seeded(0, "steps"), timed(spent):
                begun = time.process_time()
                train(model, dataset, stage, trained)
                totals[precision] = time.process_time() - begun
    total = totals[torch.float32]
    rest = total - sum(spent.values())
    shares = " | ".join(f"{seconds / total:.1%}" for seconds in (*(spent[part] for part in PARTS), rest))
    faster = f"{totals[torch.bfloat16] / total:.2f}"
    return f"| {name} | {stage.name} | {1e3 * total / stage.local_steps:.1f} | {shares} | {faster} |"


def processor() -> str:
    """The extensions that matter, as the system names them."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    return ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="federations; all of them where none is named")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    names = sorted(path.name.removesuffix(".sites.yaml") for path in FEDERATIONS.glob("*.sites.yaml"))
    lines = []
    with TemporaryDirectory() as folder:
        for name in names:
            if (FEDERATIONS / f"{name}.yaml").exists() and (not arguments.only or name in arguments.only):
                try:
                    lines += measured(name, Path(folder))
                except MmfmError as error:
                    print(f"{name} is left out: {error}", flush=True)
    if not arguments.only:
        RESULTS.write_text("\n".join([HEADER.format(processor=processor()), *lines]) + "\n")


if __name__ == "__main__":
    main()
