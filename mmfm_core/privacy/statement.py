"""What a private document promises each patient, and what it does not, for a data-protection officer to sign."""

from mmfm_core.config import Federation
from mmfm_core.privacy.accounting import composed, costs_of, tightly_composed
from mmfm_core.privacy.figures import scale_of


def statement(federation: Federation) -> list[tuple[str, str]]:
    """Terms and sentences, made from the document alone.

    Raises:
        MmfmError: see `schedule_of`.
    """
    privacy = federation.privacy
    assert privacy
    schedule, *figures = costs_of(federation)
    cost, tight = (count([schedule, *figures], privacy.delta) for count in (composed, tightly_composed))
    told = [
        (
            "Which figures leave",
            f"The AUROC of {', '.join(federation.noised_heads)} with the final shared model on test patients, once: "
            "from counts of patients by score and label, with normal noise of standard deviation "
            f"{scale_of(federation):.3g} on each count, which is paid for as one more step. All other metrics and all "
            "losses stay, also every figure of a model that a site adapted: it has no noise of its own, and its "
            "figures would tell of those it was trained on.",
        )
    ]
    return [
        (
            "Who is protected",
            "Each patient of each site, with all of the patient's studies: two sets of data are neighbours if they "
            "differ by one patient, who is in one of them and not in the other.",
        ),
        (
            "From whom",
            "From the coordinator, from all other sites, and from everybody who sees what they see. Each site adds "
            "the whole noise to what it sends, and trusts nobody to add it.",
        ),
        (
            "By what",
            f"In each of {schedule.steps} steps every training patient takes part with the chance {schedule.rate:g}, "
            "drawn independently. A patient's one gradient over all parameters that are trained, those that stay at "
            f"the site among them, is cut to the length {privacy.max_grad_norm:g}, and normal noise of "
            f"{schedule.noise:g} times that length is added to each coordinate of the sum (DP-SGD, Abadi et al. 2016). "
            "Draws and noise come from the operating system's cryptographic generator.",
        ),
        (
            "What it costs",
            f"At most ε {cost:.3f} at δ {privacy.delta:g} for each patient at each site, over all rounds of this "
            "document, by Renyi differential privacy. The site's own ledger counts it, together with every other "
            f"document's, and refuses a round before it goes beyond. (For the planned rounds as a whole a tighter "
            f"count, by privacy loss distributions, gives {tight:.3f}.)",
        ),
        *(told if figures else []),
        ("What is not covered", " ".join(_not_covered(federation))),
    ]


def _not_covered(federation: Federation) -> list[str]:
    privacy = federation.privacy
    assert privacy
    said = [
        "How many studies, patients and labels a site has, rounded as the site's own policy says, is taken as public.",
        "When a site answers can be seen.",
        "Who is a patient at several sites pays at each of them.",
        "What was learned in earlier runs, to choose this document's settings for example, is paid for by those runs.",
    ]
    if privacy.figures == "exact":
        said.insert(
            0,
            "Metrics and losses leave each site exact: they are NOT private, and ε says nothing of what they tell.",
        )
    if any(not stage.federated for stage in federation.stages):
        said.append(
            "What a site adapts after the last round has no noise. It stays at the site; who can ask it there can "
            "learn about the site's patients."
        )
    return said
