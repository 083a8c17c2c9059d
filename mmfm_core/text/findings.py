"""The findings that a chest X-ray report states."""

import re

_HEART = r"(?:heart|cardiac|cardiopericardial|cardio ?mediastinal)"
_LARGE = r"(?:enlarged|borderline)"
_SPINE = r"\w*(?:spin(?:e|al)|vertebra\w*|thoracic|lumbar|cervical)"
_VESSELS = r"(?:vascular|vascularity|venous)"

# Words of a finding, as regular expressions on lower-case text with single spaces. What belongs to a finding is what
# the Open-I columns of that name hold: scoliosis counts with the spine, hyperinflated lungs with emphysema.
FINDINGS = {
    "cardiomegaly": (
        "cardiomegaly",
        "cardiac enlargement",
        rf"(?:{_LARGE}|large|prominent) {_HEART}",
        rf"{_HEART}(?: (?!with\b)\w+){{0,6}} (?:{_LARGE}|large(?! \w))",
        rf"enlargement of (?:the )?{_HEART}",
    ),
    "effusion": (r"(?<!pericardial )effusions?", "pleural fluid", "hydropneumothorax", "hemothorax"),
    "opacity": (r"\w*opaci\w+", "air ?space disease", r"infiltrat\w+", r"consolidat\w+", r"\w*pneumonia\w*"),
    "atelectasis": (r"atelecta\w+", "lobe collapse", "collapse of the (?:left|right)"),
    "nodule_mass": (r"\w*nodul\w+(?! opaci| densit)", r"mass(?:es)?", "masslike", r"granulom\w+"),
    "fracture_bone": (r"fractur\w+",),
    "emphysema_copd": (
        r"emphysem\w+",
        "copd",
        "chronic obstructive",
        r"hyper-?(?:inflat|expan|aerat|disten)\w+",
        r"(?:large|increased) lung volumes?",
    ),
    "edema_congestion": (
        "edema",
        r"congesti\w+",
        "(?:heart|cardiac) failure",
        "chf",
        r"cephali[sz]ation",
        rf"{_VESSELS} (?:engorgement|hypertension|prominence|redistribution)",
    ),
    "degenerative_spine": (
        rf"degenerative(?: \w+){{0,6}} {_SPINE}",
        rf"{_SPINE}(?: \w+){{0,4}} degenerative",
        r"degenerative dis[ck]",
        rf"arthrit\w+(?: \w+){{0,4}} {_SPINE}",
        r"spondylo\w+",
        r"\w*osteophyt\w*",
        rf"spur(?:s|ring)?(?: \w+){{0,6}} {_SPINE}",
        r"\w*scolio\w*",
        "(?:spine |spinal |dextro ?|levo ?)curvature",
    ),
    "device": (
        r"catheters?",
        r"tub(?:es?|ing)",
        "picc",
        r"\w+-a-\w+",
        r"(?:central|venous) lines?",
        "tips?",
        r"pace(?:maker|r)s?",
        r"\w*stimulator",
        "defibrillator",
        r"leads?",
        r"(?:monitoring|medical) devices?",
        r"stents?",
        r"shunts?",
        r"coils?",
        r"filter",
        r"clips?",
        r"wires?",
        r"sutures?",
        r"staples?",
        "hardware",
        "valve replacement",
        r"(?<!breast )prosthe\w+",
    ),
}
# What denies the rest of its clause, and what denies the beginning.
BEFORE = (
    "no",
    "not",
    "without",
    "negative for",
    "(?:free|clear|absence|removal|resolution|clearing) of",
    "resolved",
    "if",
    "exclude",
    "evaluat(?:e|ion) (?:for|of)",
)
AFTER = (
    "(?:(?:is|are) )?absent",
    "(?:(?:is|are) )?(?:not|no longer) (?:seen|identified|present|visuali[sz]ed|visible|evident|demonstrated)",
    "(?:has|have) (?:since |now )?(?:resolved|cleared|been removed)",
)
# Where a denial ends besides the end of the sentence.
STOP = (
    "but",
    "however",
    "although",
    "though",
    "except",
    "aside from",
    "apart from",
    "(?<!if )there (?:is|are|has been)",
)
# What sounds like a denial and is none.
HARMLESS = (
    "no (?:significant |interval |appreciable )*change",
    "not (?:significantly )?changed",
    "(?:cannot|can not|difficult to) exclude",
)


def _any(phrases: tuple[str, ...]) -> str:
    return rf"\b(?:{'|'.join(phrases)})\b"


_FINDINGS = {finding: re.compile(_any(phrases)) for finding, phrases in FINDINGS.items()}
_SENTENCES = re.compile(r"[.;?!](?: |$)")
_CLAUSES = re.compile(_any(STOP))
_NO_DENIALS = re.compile(_any(HARMLESS))
_DENIED_AFTER = re.compile(rf"{_any(BEFORE)}.*")
# A list is denied as a whole: back to the start, or to the 'and' or comma behind the verb of another statement.
# Bounded, or a generated text of commas alone would take time that grows with its square.
_DENIED_BEFORE = re.compile(rf"(?:^|,| and )(?:(?!\b(?:is|are|has|have|with)\b).){{0,200}}?{_any(AFTER)}")


def label_findings(report: str) -> dict[str, bool]:
    """Whether a report states each of `FINDINGS`, and `normal` where it states none of them.

    A finding is stated where one of its words stands outside the scope of a denial (NegEx, Chapman et al. 2001): what
    denies before it reaches to the end of the sentence or to a word that ends denials, what denies after it reaches
    back over the list it closes. What is called possible, probable or not excluded counts as stated. These are words
    about a report, not a diagnosis.
    """
    text = " ".join(report.lower().split())
    stated = [_stated(clause) for sentence in _SENTENCES.split(text) for clause in _CLAUSES.split(sentence)]
    found = {finding: any(map(words.search, stated)) for finding, words in _FINDINGS.items()}
    return {**found, "normal": not any(found.values())}


def _stated(clause: str) -> str:
    return _DENIED_AFTER.sub("", _DENIED_BEFORE.sub("", _NO_DENIALS.sub("", clause)))
