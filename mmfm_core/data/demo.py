"""Generated hospitals: films, notes and tables in seconds, for a first run without anybody's data."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from mmfm_core.config.site import SPLITS, Split
from mmfm_core.data.demo_hospitals import HOSPITALS, Film, Hospital, Laboratory, Notes
from mmfm_core.storage import whole_folder

PATIENTS: dict[Split, int] = {"train": 150, "val": 40, "test": 400}
STUDIES_OF_A_PATIENT = (0.85, 0.11, 0.04)  # one, two, three
TRUE_STATEMENTS = 0.92
MISSING = 0.05
SIZE = 32


@dataclass(frozen=True)
class Case:
    """One study as it was drawn; what no hospital sees directly is `opacity` and `infection`."""

    patient: str
    study: str
    split: Split
    age: int
    sex: str
    opacity: bool
    infection: bool
    pneumonia: bool


def generate(folder: Path, seed: int = 0) -> None:
    """Write `<hospital>/manifest.csv` and `<hospital>/images/*.png` for every hospital, replacing earlier ones."""
    for hospital in HOSPITALS:
        with whole_folder(folder / hospital.name) as home:
            _write(home, hospital, seed)


def cases(hospital: Hospital, seed: int = 0) -> list[Case]:
    """The studies of a hospital with the factors behind them."""
    rng = _random(hospital, seed, "cases")
    drawn = []
    for number, split in enumerate(name for name in SPLITS for _ in range(PATIENTS[name])):
        patient, age, sex = f"P{number + 1:04d}", int(rng.integers(25, 92)), str(rng.choice(["f", "m"]))
        for visit in range(1 + int(rng.choice(len(STUDIES_OF_A_PATIENT), p=STUDIES_OF_A_PATIENT))):
            opacity, infection = bool(rng.random() < hospital.opacity), bool(rng.random() < hospital.infection)
            pneumonia = bool(rng.random() < hospital.pneumonia[opacity][infection])
            drawn.append(Case(patient, f"{patient}-{visit + 1}", split, age, sex, opacity, infection, pneumonia))
    return drawn


def _random(hospital: Hospital, seed: int, part: str) -> np.random.Generator:
    return np.random.default_rng([seed, *f"{hospital.name}/{part}".encode()])


def _write(home: Path, hospital: Hospital, seed: int) -> None:
    rng = _random(hospital, seed, "findings")
    rows = []
    (home / "images").mkdir()
    for case in cases(hospital, seed):
        image = f"images/{case.study}.png"
        _film(hospital.film, case.opacity, rng).save(home / image)
        findings = {"image": image}
        if hospital.notes:
            findings["note"] = _note(hospital.notes, case.infection, rng)
        if hospital.laboratory:
            findings |= {"age": str(case.age), "sex": case.sex} | _values(hospital.laboratory, case.infection, rng)
        known = {name: hospital.empty if rng.random() < MISSING else cell for name, cell in findings.items()}
        record = {"patient_id": case.patient, "study_id": case.study, "split": case.split}
        rows.append(record | known | {"pneumonia": hospital.coded[case.pneumonia]})
    with (home / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(hospital.headings.get(name, name) for name in rows[0])
        writer.writerows(row.values() for row in rows)


def _note(style: Notes, infection: bool, rng: np.random.Generator) -> str:
    if rng.random() < style.copied:
        infection = bool(rng.random() < 0.5)
    said = [
        str(rng.choice((style.infected if infection == (rng.random() < TRUE_STATEMENTS) else style.well)[part]))
        for part in range(2)
    ]
    return style.layout.format(fever=said[0], cough=said[1], remark=rng.choice(style.remarks)).strip()


def _values(laboratory: Laboratory, infection: bool, rng: np.random.Generator) -> dict[str, str]:
    effect = laboratory.response * infection
    return {
        "temperature": f"{laboratory.temperature + 0.9 * effect + rng.normal(0, 0.6):.1f}",
        "crp": f"{laboratory.crp * np.exp(1.4 * effect + rng.normal(0, 0.9)):.0f}",
        "leukocytes": f"{max(0.5, laboratory.leukocytes + 3.0 * effect + rng.normal(0, 2.6)):.1f}",
    }


def _film(unit: Film, opacity: bool, rng: np.random.Generator) -> Image.Image:
    """A chest in a few curves: two lungs crossed by ribs, a heart, and for an opacity a cloud in one lung."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    dx, dy = rng.uniform(-1, 1, 2)
    wide = rng.uniform(0.92, 1.08)

    def disc(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        distance: np.ndarray = ((x - 15.5 - dx - cx) / (rx * wide)) ** 2 + ((y - 15.5 - dy - cy) / ry) ** 2
        return distance

    tissue, air = 0.62 + rng.normal(0, 0.03), 0.22 + rng.normal(0, 0.03)
    lungs = np.maximum(*(1 / (1 + np.exp(8 * (disc(side, -1, 5.5, 9.5) - 1))) for side in (-6.5, 6.5)))
    ribs = 0.08 * np.clip(np.sin(0.9 * (y + 0.08 * (x - 15.5 - dx) ** 2) + rng.uniform(0, 6)), 0, 1)
    grey = tissue + lungs * (air - tissue + ribs)
    heart = 1 / (1 + np.exp(6 * (disc(1.5, 5, rng.uniform(4, 5.5), 5) - 1)))
    grey += (tissue + 0.05 - grey) * heart
    if opacity:
        side, height, spread = rng.choice([-6.5, 6.5]), rng.uniform(-4, 5), rng.uniform(2.6, 3.8)
        cloud = np.exp(-disc(side + rng.uniform(-1, 1), height, spread, spread) / 2)
        grey += unit.contrast * rng.uniform(0.35, 0.55) * cloud * lungs
    pixels = np.clip(grey, 0, 1) ** unit.gamma
    image = Image.fromarray((pixels * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(unit.blur))
    noisy = np.asarray(image) / 255 + rng.normal(0, unit.noise, (SIZE, SIZE))
    return Image.fromarray((np.clip(noisy, 0, 1) * 255).astype(np.uint8))
