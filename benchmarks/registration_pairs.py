"""Pairs of brain images whose truth is known, made from `registration_pairs`: what the brains federations read.

    python benchmarks/registration_pairs.py [--data ../shared/data] [--out runs/benchmarks/registration_pairs]

| kind | moving onto fixed | truth |
|---|---|---|
| people-2d | T1 slices of two people | three tissue classes, of each slice's own intensities |
| visits-3d | FLAIR of the second visit onto the first | a known random warp of aligned images, at landmarks |
| contrasts-2d | T1 or T2 slices onto FLAIR, one person | a known random warp of aligned images, at landmarks |
| contrasts-3d | T1 or T2 onto FLAIR, one person | a known random warp of aligned images, at landmarks |

Tissue classes show real differences between people, but of the very intensities that a registration brings together.
A warp is exact and independent of the intensities, but drawn here and not by nature. Both people and warps are few.

Not used: the AAL regions of the two templates, which lie in MNI space already: doing nothing has Dice 0.79 there, an
affine map 0.78, a dense one 0.74; and the follow-ups' own transforms, which are rigid, so that
no dense map can do better than an affine one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from scipy.cluster.vq import kmeans2

from mmfm_core.data.readers import read_image_file, read_volume_file

Array = np.ndarray
Pair = tuple[Array, Array]
Row = dict[str, str]
TRAIN = {"r27", "r30", "lit_long_patient01"}
"""Patients; the others test. No pair joins a training patient with a test patient."""


def main() -> None:
    """Write images, label maps and the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/registration_pairs"))
    arguments = parser.parse_args()
    source, out = arguments.data / "registration_pairs", arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows = [*people(source, out)]
    for patient in ("lit_long_patient01", "lit_long_patient12"):
        rows += [*visits(source, out, patient), *contrasts(source, out, patient)]
    pd.DataFrame(rows).to_csv(out / "manifest.csv", index=False)
    print(f"{len(rows)} pairs in {out}")


def people(source: Path, out: Path) -> Iterator[Row]:
    """Each training person onto the other, and the two who test likewise."""
    for first, second in (("r27", "r30"), ("r16", "r62")):
        tissue = {n: classes(read_image_file(source / f"slices2d/{n}.png", (256, 256))[0]) for n in (first, second)}
        images = {n: read_image_file(source / f"slices2d/{n}.png", (256, 256))[0] for n in (first, second)}
        for moving, fixed in ((first, second), (second, first)):
            pair = (images[moving], images[fixed]), (tissue[moving], tissue[fixed])
            yield written(out, "people-2d", f"{moving}_{fixed}", moving, *pair)


def visits(source: Path, out: Path, patient: str) -> Iterator[Row]:
    """The second visit, warped, onto the first: three warps."""
    first, second = (volume(source, f"{patient}_study{visit}_flair") for visit in (1, 2))
    for seed in range(3):
        yield warped(out, "visits-3d", f"{patient}_{seed}", patient, second, first, seed)


def contrasts(source: Path, out: Path, patient: str) -> Iterator[Row]:
    """T1 and T2, warped, onto FLAIR: volumes, and slices of finer volumes."""
    for visit in (1, 2):
        for number, other in enumerate(("t1w", "t2w")):
            name, seed = f"{patient}_{visit}_{other}", 10 * visit + number
            moving, fixed = (volume(source, f"{patient}_study{visit}_{c}") for c in (other, "flair"))
            yield warped(out, "contrasts-3d", name, patient, moving, fixed, seed)
            grid = (112, 128, 54), (2.0, 2.0, 3.0)
            moving, fixed = (volume(source, f"{patient}_study{visit}_{c}", *grid) for c in (other, "flair"))
            for z in (24, 30, 36):
                one = moving[..., z], fixed[..., z]
                yield warped(out, "contrasts-2d", f"{name}_{z}", patient, *one, 100 * seed + z)


def volume(
    source: Path,
    name: str,
    size: tuple[int, int, int] = (48, 56, 40),
    spacing: tuple[float, float, float] = (4.0, 4.0, 4.0),
) -> Array:
    """A volume of the longitudinal pairs in their common space, [0, 1], [x, y, z]."""
    voxels = read_volume_file(source / f"longitudinal/{name}_common.nii.gz", size, spacing)[0]
    return np.clip(voxels / np.percentile(voxels, 99.5), 0, 1)


def classes(image: Array) -> Array:
    """Three tissues 1 to 3 from dark to bright by k-means of the intensities of the body; 0 is background."""
    body = image > 0.05
    values = image[body].astype(float)
    _, each = kmeans2(values, np.percentile(values, [15, 50, 85]), minit="matrix")
    labels = np.zeros(image.shape, np.uint8)
    labels[body] = each + 1
    return labels


def warped(out: Path, kind: str, name: str, patient: str, moving: Array, fixed: Array, seed: int) -> Row:
    """A pair of aligned images, the moving one warped, with landmarks on a lattice in the head.

    Labels sit at whole voxels, which alone makes an error of about 0.4 voxels in 2D and 0.5 in 3D.
    """
    where = truth(moving.shape, seed)
    shown = ndimage.map_coordinates(moving, where, order=1)
    labels = np.zeros((2, *moving.shape), np.int16)
    lattice = np.meshgrid(*(np.arange(6, side - 6, 9 if moving.ndim == 2 else 7) for side in moving.shape))
    head = ndimage.binary_erosion(ndimage.binary_fill_holes(fixed > 0.15), iterations=3)
    label = 0
    for point in np.stack(lattice, -1).reshape(-1, moving.ndim):
        goal = tuple(np.rint(where[(slice(None), *point)]).astype(int))
        if all(0 <= g < side for g, side in zip(goal, head.shape, strict=True)) and head[goal] and not labels[1][goal]:
            label += 1
            labels[0][tuple(point)] = labels[1][goal] = label
    return written(out, kind, name, patient, (shown, fixed), (labels[0], labels[1]))


def truth(size: tuple[int, ...], seed: int) -> Array:
    """Where each voxel of the warped image was before, [d, *size]: a random affine map after a random smooth one."""
    random, dimensions = np.random.default_rng(seed), len(size)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in size), indexing="ij")).astype(float)
    sigma = min(size) / 8
    noise = np.stack([ndimage.gaussian_filter(random.standard_normal(size), sigma, mode="wrap") for _ in size])
    smooth = noise / noise.std() * 0.2 * sigma
    matrix = np.eye(dimensions) + random.normal(0, 0.06, (dimensions, dimensions))
    centre = (np.array(size) - 1) / 2
    shift = random.normal(0, 0.03, dimensions) * size + centre
    each = (...,) + (None,) * dimensions
    moved: Array = np.tensordot(matrix, grid + smooth - centre[each], 1) + shift[each]
    return moved


def written(
    out: Path, kind: str, name: str, patient: str, images: tuple[Array, Array], labels: tuple[Array, Array]
) -> Row:
    """The files of a pair, and its row."""
    row = {"study": f"{kind}_{name}", "patient_id": patient, "kind": kind}
    row["split"] = "train" if patient in TRAIN else "test"
    for role, image, label in zip(("moving", "fixed"), images, labels, strict=True):
        for column, array in ((role, np.rint(255 * image).astype(np.uint8)), (f"{role}_labels", label)):
            path = out / f"{row['study']}_{column}.{'png' if array.ndim == 2 else 'nii.gz'}"
            if array.ndim == 2:
                Image.fromarray(array.astype(np.uint8)).save(path)
            else:
                nibabel.save(nibabel.Nifti1Image(array, np.diag([4.0, 4.0, 4.0, 1.0])), path)
            row[column] = path.name
    return row


if __name__ == "__main__":
    main()
