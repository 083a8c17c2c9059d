"""The four hospitals of the demonstration: what each one's films, notes, laboratory and coding are like.

A study has two findings that no column holds: an opacity, which only the film shows, and an infection, which laboratory
and note tell. What is coded as pneumonia depends on both, and on the hospital, as it does in practice:

- university: by the book, opacity and infection together; it writes no notes.
- intensive: nearly everyone is inflamed to begin with, so that an opacity alone often counts.
- outpatient: sees many old scars, so that an infection counts more than an opacity; it has no laboratory.
- district: trusts its noisy portable films less than a clear infection; its notes are carried over from earlier stays
  and say nothing of today.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Film:
    """A hospital's X-ray unit.

    Attributes:
        contrast: how far an opacity stands out (1 is a good digital unit).
        gamma: the curve from dose to grey value.
        noise: standard deviation of the grey values, which go from 0 to 1.
        blur: radius in pixels.
    """

    contrast: float
    gamma: float
    noise: float
    blur: float


@dataclass(frozen=True)
class Laboratory:
    """A hospital's laboratory values.

    Attributes:
        response: the share of an infection's effect that is left when the blood is drawn.
        temperature, crp, leukocytes: mean of patients without infection (degrees Celsius, mg/l, per nl).
    """

    response: float = 1.0
    temperature: float = 37.0
    crp: float = 12.0
    leukocytes: float = 8.5


@dataclass(frozen=True)
class Notes:
    """A hospital's way of writing.

    Attributes:
        infected, well: what is said of fever, and of cough, each in several wordings.
        remarks: sentences that say nothing of infection.
        layout: how the three are put together.
        copied: the share of notes carried over from another stay, which say nothing of today.
    """

    infected: tuple[tuple[str, ...], tuple[str, ...]]
    well: tuple[tuple[str, ...], tuple[str, ...]]
    remarks: tuple[str, ...]
    layout: str
    copied: float = 0.0


@dataclass(frozen=True)
class Hospital:
    """One hospital.

    Attributes:
        opacity, infection: how common each finding is.
        pneumonia: the share coded as pneumonia, by [opacity][infection].
        headings: column names that differ from ours.
        coded: how the label's cells read for no and yes.
        empty: what stands in an empty cell.
    """

    name: str
    opacity: float
    infection: float
    pneumonia: tuple[tuple[float, float], tuple[float, float]]
    film: Film
    laboratory: Laboratory | None = None
    notes: Notes | None = None
    headings: dict[str, str] = field(default_factory=dict)
    coded: tuple[str, str] = ("no", "yes")
    empty: str = ""


HOSPITALS = (
    Hospital(
        name="university",
        opacity=0.55,
        infection=0.50,
        pneumonia=((0.02, 0.06), (0.10, 0.95)),
        film=Film(contrast=1.0, gamma=1.0, noise=0.03, blur=0.4),
        laboratory=Laboratory(),
    ),
    Hospital(
        name="intensive",
        opacity=0.50,
        infection=0.55,
        pneumonia=((0.02, 0.06), (0.65, 0.95)),
        film=Film(contrast=0.9, gamma=1.3, noise=0.05, blur=0.6),
        laboratory=Laboratory(temperature=37.5, crp=60.0, leukocytes=10.5),
        notes=Notes(
            infected=(("Febrile", "High fever", "T up"), ("purulent sputum", "purulent secr.")),
            well=(("Afebrile", "No fever", "T normal"), ("no sputum", "clear secr.")),
            remarks=("", "SOB.", "Vent."),
            layout="Pt: {fever}, {cough}. {remark}",
        ),
        headings={"temperature": "temp_c", "crp": "crp_mg_l", "leukocytes": "wbc"},
        empty="n.d.",
    ),
    Hospital(
        name="outpatient",
        opacity=0.55,
        infection=0.50,
        pneumonia=((0.02, 0.50), (0.08, 0.95)),
        film=Film(contrast=0.9, gamma=0.8, noise=0.04, blur=0.5),
        notes=Notes(
            infected=(
                ("Fieber seit gestern", "Hohes Fieber", "Schüttelfrost"),
                ("eitriger Auswurf", "produktiver Husten"),
            ),
            well=(("Kein Fieber", "Stets fieberfrei", "Temperatur normal"), ("trockener Husten", "kein Auswurf")),
            remarks=("", "Raucher.", "Kontrolle."),
            layout="{fever}, {cough}. {remark}",
        ),
        headings={"note": "befund", "pneumonia": "pneumonie"},
        coded=("nein", "ja"),
    ),
    Hospital(
        name="district",
        opacity=0.50,
        infection=0.50,
        pneumonia=((0.02, 0.35), (0.05, 0.95)),
        film=Film(contrast=0.8, gamma=1.1, noise=0.06, blur=0.8),
        laboratory=Laboratory(),
        notes=Notes(
            infected=(("Febrile", "High fever", "Fever since yesterday"), ("productive cough", "yellow sputum")),
            well=(("Afebrile", "No fever", "Normal temperature"), ("dry cough", "no sputum")),
            remarks=("", "Hx as prev.", "c/o dyspnoea."),
            layout="{remark} {fever}, {cough}.",
            copied=1.0,
        ),
        coded=("0", "1"),
    ),
)
