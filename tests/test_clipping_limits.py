"""What clipping engines must not do: carry anything between patients or steps, or miss a gradient without a word."""

from collections.abc import Callable

import pytest
import torch
from test_clipping import STUDIES_OF, Small, batch_of, by_hand, flat, run
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.data.dataset import Batch
from mmfm_core.errors import MmfmError
from mmfm_core.models import _torchvision_ops  # noqa: F401
from mmfm_core.privacy.engines import ENGINES, choose, unsupported

from monai.networks.nets import SwinUNETR  # isort: skip

ONE_PASS = [name for name in ENGINES if name != "loop"]


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return batch_of(torch.randn(len(STUDIES_OF), 3, 6) * 3)


class Silenced(Small):
    """Where a study's first number is 99, its loss is a constant: it is there, and its gradient is zero."""

    def losses(self, batch: Batch) -> Tensor:
        return torch.where(batch.inputs["x"][:, 0, 0] == 99, 0.0, super().losses(batch))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("study", [1, 4, 7], ids=["of one", "of one, too", "of four"])
def test_a_patient_that_is_not_finite_adds_zero_and_changes_no_bit_of_the_others(engine, study, value, batch):
    torch.manual_seed(0)
    model = Silenced()
    of_patient = STUDIES_OF[study] == STUDIES_OF
    broken, silent = batch.inputs["x"].clone(), batch.inputs["x"].clone()
    broken[study, 1, 2] = value
    silent[of_patient, 0, 0] = 99
    found, truth = (run(ENGINES[engine], model, batch_of(x)) for x in (broken, silent))
    assert (found.dropped, truth.dropped) == (1, 0)
    assert all(torch.equal(found.total[name], truth.total[name]) for name in truth.total)
    assert found.loss == truth.loss
    assert flat(found.total).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_finite_loss_with_a_gradient_that_is_not_is_dropped(engine, batch):
    class Rooted(Small):
        def losses(self, batch: Batch) -> Tensor:
            states = self.first(batch.inputs["x"])
            return torch.where(states == states.detach(), (states - states.detach()).abs().sqrt(), states).sum((1, 2))

    torch.manual_seed(0)
    found = run(ENGINES[engine], Rooted(), batch)
    assert found.dropped == 4
    assert (flat(found.total).any(), found.loss) == (False, 0.0)


class Branches(nn.Module):
    """An image and a text branch; a site's batch may lack either."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 1)

    def losses(self, batch: Batch) -> Tensor:
        states = sum(torch.tanh(getattr(self, name)(batch.inputs[name])) for name in batch.inputs)
        return self.head(states).flatten(1).sum(1).square()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_branch_without_input_in_the_second_step_reuses_nothing_of_the_first(engine):
    """Opacus' ghost clipping takes the first step's norms of the absent branch into the second one's."""
    torch.manual_seed(0)
    model = Branches()
    image, text = torch.randn(2, 4, 6)
    here = torch.ones(4, dtype=torch.bool)
    first = Batch({"image": image, "text": 100 * text}, {"image": here, "text": here}, {}, {})
    second = Batch({"image": image}, {"image": here}, {}, {})
    parameters = dict(model.named_parameters())
    steps = [ENGINES[engine](model, model.losses, batch, torch.arange(4), parameters, 0.1) for batch in (first, second)]
    assert steps[0].total["text.weight"].any()
    assert not steps[1].total["text.weight"].any()
    fresh = ENGINES["loop"](model, model.losses, second, torch.arange(4), parameters, 0.1)
    torch.testing.assert_close(flat(steps[1].total), flat(fresh.total), rtol=1e-5, atol=1e-7)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def losses(self, batch: Batch) -> Tensor:
        x = self.first(batch.inputs["x"])
        return self.attention(x, x, x)[0].square().sum((1, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def losses(self, batch: Batch) -> Tensor:
        return self.last(torch.tanh(self.first(batch.inputs["x"]))).square().sum((1, 2))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.token = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def losses(self, batch: Batch) -> Tensor:
        return (self.first(batch.inputs["x"]) * self.token).square().sum((1, 2))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(3)

    def losses(self, batch: Batch) -> Tensor:
        return self.norm(self.first(batch.inputs["x"])).square().sum((1, 2))


REFUSED: dict[Callable[[], nn.Module], str] = {
    Attending: "'attention' is of torch's MultiheadAttention",
    Tied: "'first.weight' is tied",
    Bare: r"'' \(Bare\) holds a bare parameter",
    Mixing: "'norm' is BatchNorm1d",
}


@pytest.mark.parametrize("build", REFUSED)
def test_what_hooks_would_miss_is_refused_by_name_and_left_to_the_loop(build, batch):
    torch.manual_seed(0)
    model = build()
    parameters = dict(model.named_parameters())
    assert choose(model, parameters) == "loop"
    for engine in ONE_PASS:
        with pytest.raises(MmfmError, match=f"{REFUSED[build]}.*use the engine 'loop'"):
            run(ENGINES[engine], model, batch)
    found = run(ENGINES["loop"], model, batch)
    torch.testing.assert_close(flat(found.total), by_hand(model, batch, STUDIES_OF), rtol=1e-4, atol=1e-5)


def test_attention_counts_where_any_of_it_is_trained_and_not_where_it_is_frozen():
    model = Attending()
    parameters = dict(model.named_parameters())
    assert unsupported(model, {name: each for name, each in parameters.items() if name.startswith("first")}) is None
    inner = unsupported(model, {"attention.out_proj.weight": parameters["attention.out_proj.weight"]})
    assert "'attention.out_proj' is of torch's MultiheadAttention" in str(inner)


def test_batch_norm_that_is_frozen_still_mixes_unless_it_uses_its_own_statistics():
    model = Mixing()
    model.norm.requires_grad_(False)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert "'norm' is BatchNorm1d" in str(unsupported(model, parameters))
    model.norm.eval()
    assert unsupported(model, parameters) is None


class Scaling(nn.Module):
    """Layers without a name that Opacus knows: one number for each feature, and a norm without bias."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm, self.conv = self.Layer(), nn.LayerNorm(6, bias=False), nn.Conv1d(3, 2, 2, stride=2)

    def losses(self, batch: Batch) -> Tensor:
        return self.conv(self.norm(self.scale(batch.inputs["x"]))).square().sum((1, 2))


def test_layers_that_opacus_has_no_function_for(batch):
    torch.manual_seed(0)
    model = Scaling()
    found = run(ENGINES["bookkeeping"], model, batch)
    torch.testing.assert_close(flat(found.total), by_hand(model, batch, STUDIES_OF), rtol=1e-4, atol=1e-5)


class Borrowing(nn.Module):
    """Reads a weight past its layer, which no list of layers can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def losses(self, batch: Batch) -> Tensor:
        return F.linear(torch.tanh(self.first(batch.inputs["x"])), self.first.weight).square().sum((1, 2))


class Windowed(nn.Module):
    """A layer that sees more rows than there are studies, as Swin's windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def losses(self, batch: Batch) -> Tensor:
        x = batch.inputs["x"]
        return self.first(x.flatten(0, 1)).reshape(len(x), -1).square().sum(1)


class Viewed(nn.Module):
    """Writes over the output of a layer that is a view, which cuts it out of autograd's graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def losses(self, batch: Batch) -> Tensor:
        return F.relu_(self.first(batch.inputs["x"])).square().sum((1, 2))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Borrowing, "'first.weight' is reached past the layer"),
        (Viewed, "'first.weight' is reached past the layer"),
        (Windowed, "'first' does not see one row per study"),
    ],
)
def test_book_keeping_stops_where_it_would_miss_a_gradient_that_only_a_pass_shows(build, said, batch):
    with pytest.raises(MmfmError, match=f"{said}.*use the engine 'loop'"):
        run(ENGINES["bookkeeping"], build(), batch)


class Overwriting(nn.Module):
    """Its second layer is called thrice, once for nothing; and the first one's output is written over in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), nn.Linear(6, 6)

    def losses(self, batch: Batch) -> Tensor:
        states = self.second(F.relu(self.first(batch.inputs["x"]), inplace=True))
        self.second(states)
        return self.second(torch.tanh(states)).square().sum((1, 2))


def test_outputs_that_are_written_over_and_calls_that_lead_nowhere(batch):
    torch.manual_seed(0)
    model = Overwriting()
    found = run(ENGINES["bookkeeping"], model, batch)
    torch.testing.assert_close(flat(found.total), by_hand(model, batch, STUDIES_OF), rtol=1e-4, atol=1e-5)


def test_norms_by_gram_matrices_hold_where_a_studys_tokens_cancel():
    """Two tokens of opposite gradients and almost one input: the sum of products loses every digit of the norm."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64, bias=False)

        def losses(self, batch: Batch) -> Tensor:
            return (self.first(batch.inputs["x"]) * torch.tensor([1.0, -1.0])[:, None]).sum((1, 2)) * 1e3

    torch.manual_seed(0)
    model = Cancelling()
    x = torch.randn(3, 1, 64)
    pairs = batch_of(torch.cat([x, x + 1e-4 * torch.randn_like(x)], 1))
    found, rest = (run(ENGINES["bookkeeping"], model, pairs.rows(r), torch.arange(len(r))) for r in ([0, 1, 2], [1, 2]))
    assert float((flat(found.total) - flat(rest.total)).norm()) == pytest.approx(0.5, rel=1e-3)


def test_swin_unetr_is_for_the_loop():
    torch.manual_seed(0)
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    parameters = dict(network.named_parameters())
    assert "holds a bare parameter" in str(unsupported(network, parameters))
    x = torch.randn(3, 1, 64, 32, 32)

    def losses(batch: Batch) -> Tensor:
        return network(batch.inputs["x"]).square().flatten(1).mean(1)

    patients = torch.tensor([0, 1, 0])
    found = ENGINES["loop"](network, losses, batch_of(x), patients, parameters, 0.1)
    truth = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rows in ([0, 2], [1]):
        network.zero_grad()
        losses(batch_of(x[rows])).mean().backward()
        norm = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                truth[name] += parameter.grad * min(1.0, 0.1 / float(norm))
    torch.testing.assert_close(flat(found.total), flat(truth), rtol=1e-4, atol=1e-6)
