"""FoldBatch: against the module called on one index of the leading dims at a time."""

from __future__ import annotations

import copy
import itertools
import math
from collections import namedtuple
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_iw import IWAE_ELBO, ImportanceSampler
from pyro_iw.nn import FoldBatch

LEADING = [(), (5,), (4, 5), (3, 1, 2), (2, 3, 4), (0,), (3, 0)]


def by_index(module: nn.Module, x: Tensor, event_dim: int) -> Tensor:
    """The module on each index of the leading dims by itself, in a batch of one."""
    leading = x.shape[: x.dim() - event_dim]
    parts = [module(x[index][None])[0] for index in itertools.product(*map(range, leading))]
    return torch.stack(parts).reshape(*leading, *parts[0].shape)


class Counting(nn.Module):
    """Doubles its input and keeps the shapes that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, *tensors: Tensor) -> Tensor:
        self.shapes += [tuple(tensor.shape) for tensor in tensors]
        return 2 * sum(tensor.flatten(1).sum(1) for tensor in tensors)


class Returning(nn.Module):
    """Calls a function, for outputs of all kinds."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "event"),
    [
        (nn.Conv2d(2, 3, 3), (2, 6, 5)),
        (nn.ConvTranspose2d(2, 3, 4, stride=2), (2, 3, 4)),
        (nn.Conv1d(2, 3, 2), (2, 6)),
        (nn.BatchNorm2d(2).eval(), (2, 3, 3)),
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 1, 2)), (3,)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), (1, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_index_as_if_it_were_alone(module: nn.Module, event: tuple[int, ...]) -> None:
    for leading in LEADING:
        x = torch.randn(*leading, *event)
        y = FoldBatch(module, len(event))(x)
        if 0 in leading:
            assert y.shape == (*leading, *module(torch.randn(1, *event)).shape[1:])
        else:
            torch.testing.assert_close(y, by_index(module, x, len(event)))


def test_memory_order_does_not_matter() -> None:
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 4, 5, 2, 5).permute(1, 2, 3, 4, 0)  # [4, 5, 2, 5, 4]
    torch.testing.assert_close(FoldBatch(conv, 3)(x), by_index(conv, x, 3))


def test_gradients() -> None:
    conv = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(4, 1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 5, 3, 2, 2, dtype=torch.float64)
    variables = (x, conv.weight, conv.bias)
    for expanded in (x, x.expand(4, 5, 2, 4, 4)):
        folded = torch.autograd.grad((weights * FoldBatch(conv, 3)(expanded)).sum(), variables)
        alone = torch.autograd.grad((weights * by_index(conv, expanded, 3)).sum(), variables)
        torch.testing.assert_close(folded, alone)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    layer = kind(3, 6, batch_first=True, **options)
    directions = 2 if layer.bidirectional else 1
    # As many as the layers: a batch on dim 0 would pass unnoticed.
    for leading in ((), (4,), (4, 5), (2, 2)):
        x = torch.randn(*leading, 7, 3)
        output, state = FoldBatch(layer, 2)(x)
        assert output.shape == (*leading, 7, directions * 6)
        states = state if isinstance(state, tuple) else (state,)
        for index in itertools.product(*map(range, leading)):
            expected, final = layer(x[index][None])
            torch.testing.assert_close(output[index], expected[0])
            finals = final if isinstance(final, tuple) else (final,)
            for ours, theirs in zip(states, finals, strict=True):
                assert ours.shape == (layer.num_layers * directions, *leading, 6)
                torch.testing.assert_close(ours[(slice(None), *index)], theirs[:, 0])


def test_recurrent_layers_are_refused_where_they_would_be_wrong() -> None:
    with pytest.raises(ValueError, match="batch_first=True"):
        FoldBatch(nn.GRU(3, 6), 2)
    with pytest.raises(ValueError, match="takes no initial state"):
        FoldBatch(nn.GRU(3, 6, batch_first=True), 2)(torch.randn(4, 7, 3), torch.randn(1, 4, 6))


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformers(batch_first: bool) -> None:
    """With the steps of a sequence on dim 0 they would attend from one datapoint to others."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
    modules = [
        layer,
        nn.Sequential(nn.Identity(), layer),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first),
        nn.MultiheadAttention(4, 2, batch_first=batch_first),
    ]
    x = torch.randn(2, 3, 5, 4)
    for module in modules:
        if not batch_first:
            with pytest.raises(ValueError, match="batch_first=True"):
                FoldBatch(module, 2)
            continue
        inputs = {nn.MultiheadAttention: 3, nn.TransformerDecoderLayer: 2}.get(type(module), 1)
        y = FoldBatch(module, [2] * inputs)(*[x] * inputs)
        alone = module(*[x[1, 2][None]] * inputs)
        if isinstance(y, tuple):
            y, alone = y[0], alone[0]
        torch.testing.assert_close(y[1, 2], alone[0])


def test_batch_norm_in_train_mode_is_that_of_all_rows() -> None:
    ours, theirs = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    x = 3 + 2 * torch.randn(4, 5, 2, 3, 3)
    y = FoldBatch(ours, 3)(x)
    torch.testing.assert_close(y, theirs(x.flatten(0, 1)).unflatten(0, (4, 5)))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    # Independently of any BatchNorm: channels have mean 0 and variance 1 over everything else.
    torch.testing.assert_close(y.mean((0, 1, 3, 4)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var((0, 1, 3, 4), correction=0), torch.ones(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 1, 3), (1, 5, 3), (5, 3), (3,)])
def test_arguments_are_broadcast(shape: tuple[int, ...]) -> None:
    bilinear = nn.Bilinear(2, 3, 4)
    x, y = torch.randn(4, 5, 2), torch.randn(*shape)
    out = FoldBatch(bilinear, 1)(x, y)
    wide = y.expand(4, 5, 3)
    for i, j in itertools.product(range(4), range(5)):
        torch.testing.assert_close(out[i, j], bilinear(x[i, j][None], wide[i, j][None])[0])


def test_an_event_dim_for_each_argument() -> None:
    module = Returning(lambda image, flag, z, scale: scale * (image.sum((1, 2)) + z) if flag else None)
    image, z = torch.randn(5, 3, 3), torch.randn(4, 5)
    out = FoldBatch(module, (2, 0))(image, True, z, scale=2.0)
    torch.testing.assert_close(out, 2 * (image.sum((-1, -2)) + z))
    assert FoldBatch(module, (2, 0))(image, False, z, scale=2.0) is None


def test_what_is_shared_is_computed_once() -> None:
    counting = Counting()
    folded = FoldBatch(counting, 1)
    x = torch.randn(5, 3)
    truth = 2 * x.sum(-1)
    out = folded(x.expand(1000, 5, 3))
    assert counting.shapes == [(5, 3)]
    torch.testing.assert_close(out, truth.expand(1000, 5))
    assert out.stride(0) == 0

    # A size of 1 beside an expanded dim, and a dim that only one of the arguments shares.
    counting.shapes.clear()
    out = folded(x.expand(4, 5, 3), torch.ones(1, 1, 3))
    assert counting.shapes == [(5, 3), (5, 3)]
    torch.testing.assert_close(out, (truth + 6).expand(4, 5))
    counting.shapes.clear()
    z = torch.randn(4, 5, 3)
    out = folded(x.expand(4, 5, 3), z)
    assert counting.shapes == [(20, 3), (20, 3)]
    torch.testing.assert_close(out, truth + 2 * z.sum(-1))

    # Dropout included: one mask for all that share their input, another one for each that does not.
    dropped = FoldBatch(nn.Dropout(0.5), 1)(torch.ones(200).expand(4, 200))
    assert (dropped == dropped[0]).all()
    dropped = FoldBatch(nn.Dropout(0.5), 1)(torch.ones(4, 200))
    assert not (dropped == dropped[0]).all()

    # In the middle, and with event dims that are expanded themselves: those are no batch.
    counting.shapes.clear()
    middle = torch.randn(4, 1, 5, 1).expand(4, 6, 5, 3)
    torch.testing.assert_close(folded(middle), 2 * middle.sum(-1))
    assert counting.shapes == [(20, 3)]


def test_structured_outputs() -> None:
    Pair = namedtuple("Pair", ["left", "right"])

    def split(x: Tensor) -> dict[str, Any]:
        return {"pair": Pair(x, [x.sum(1), None]), "rest": (x[:, :1, None],)}

    x = torch.randn(4, 5, 3)
    out = FoldBatch(Returning(split), 1)(x)
    assert isinstance(out["pair"], Pair)
    torch.testing.assert_close(out["pair"].left, x)
    torch.testing.assert_close(out["pair"].right[0], x.sum(-1))
    assert out["pair"].right[1] is None
    torch.testing.assert_close(out["rest"], (x[..., :1, None],))

    moved = FoldBatch(Returning(lambda x: (x, x.T)), 1, batch_dims=(0, 1))(x)
    torch.testing.assert_close(moved[1], x.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FoldBatch(nn.Conv2d(1, 1, 2), 3)(torch.randn(4, 4)), r"event_dim=3.*shape \(4, 4\)"),
        (
            lambda: FoldBatch(nn.Bilinear(2, 3, 4), 1)(torch.ones(4, 2), torch.ones(5, 3)),
            r"\(4, 2\), \(5, 3\)",
        ),
        (
            lambda: FoldBatch(Returning(lambda x: x.reshape(-1, 6)), 1)(torch.ones(4, 5, 3)),
            r"batch of 20 \(leading dims \(4, 5\)\) and returned the shape \(10, 6\).*dim 0",
        ),
        (lambda: FoldBatch(Returning(lambda x: x.sum()), 1)(torch.ones(4, 3)), r"returned the shape \(\)"),
        (
            lambda: FoldBatch(Returning(lambda x: (x, x)), 1, batch_dims=(0,))(torch.ones(4, 3)),
            "for more tensors than that",
        ),
        (lambda: FoldBatch(nn.Linear(1, 1), 1)(), r"called with 0 tensor\(s\)"),
        (
            lambda: FoldBatch(nn.Linear(1, 1), (1, 1))(torch.ones(1)),
            r"\(1, 1\) was called with 1 tens",
        ),
        (lambda: FoldBatch(nn.Linear(1, 1), -1), "event_dim must be"),
        (lambda: FoldBatch(nn.Linear(1, 1), 1, batch_dims=(0, -1)), "batch_dims must be"),
    ],
)
def test_errors_name_shapes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_distribution_is_no_output() -> None:
    with pytest.raises(TypeError, match="returned a Normal"):
        FoldBatch(Returning(lambda x: dist.Normal(x, 1.0)), 1)(torch.ones(4, 3))


def test_names_and_checkpoints() -> None:
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wrapped = FoldBatch(copy.deepcopy(plain), 1)
    nn.init.zeros_(wrapped.module[0].weight)
    names = [f"module.{name}" for name in plain.state_dict()]
    assert list(wrapped.state_dict()) == names
    assert dict(wrapped.named_parameters()).keys() <= set(names)

    x = torch.randn(4, 5, 3)
    expected = plain.eval()(x.flatten(0, 1)).unflatten(0, (4, 5))
    for state in (plain.state_dict(), FoldBatch(plain, 1).state_dict()):
        fresh = FoldBatch(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 1).eval()
        fresh.load_state_dict(state)
        torch.testing.assert_close(fresh(x), expected)
    # Below other modules, and strictly: what is missing or too much is still an error.
    parent = nn.ModuleDict({"decoder": wrapped})
    parent.load_state_dict(nn.ModuleDict({"decoder": plain}).state_dict())
    torch.testing.assert_close(parent.eval()["decoder"](x), expected)
    with pytest.raises(RuntimeError, match="Missing"):
        wrapped.load_state_dict({"0.weight": torch.ones(2, 3)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        wrapped.load_state_dict({**plain.state_dict(), "other": torch.ones(())})
    assert repr(wrapped).startswith("FoldBatch(\n  event_dim=1\n  (module)")


# With Pyro


class VAE:
    """One latent image a datapoint, decoded by a convolution; ``net`` runs as it is given."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 4, 4), 1.0).to_event(3))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        loc = pyro.param("loc", torch.full((len(x), 1, 4, 4), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.4).to_event(3))


def convolution() -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(1, 2, 3)


def test_log_weights_are_those_of_particles_one_by_one() -> None:
    x = torch.randn(3, 2, 2, 2)
    plain, folded = VAE(convolution()), VAE(FoldBatch(convolution(), 3))
    with pytest.raises(ValueError, match="not with 6 in one pass"):
        IWAE_ELBO(K=6).loss(plain.model, plain.guide, x)
    pyro.clear_param_store()
    samples = ImportanceSampler(folded.model, folded.guide, num_particles=6)(x)
    assert samples.plates == ("data",)
    conv, variance = convolution(), 0.4**2
    for k, n in itertools.product(range(6), range(3)):
        z = samples.values["z"][k, n]
        truth = -(z.square().sum() + 16 * math.log(2 * math.pi)) / 2
        truth -= ((x[n] - conv(z[None])[0]).square().sum() / 0.25 + 8 * math.log(2 * math.pi * 0.25)) / 2
        truth += ((z - 0.1).square().sum() / variance + 16 * math.log(2 * math.pi * variance)) / 2
        torch.testing.assert_close(samples.log_weights[k, n], truth, rtol=1e-4, atol=1e-4)


class Model(PyroModule):
    """The same model, with the network as an attribute."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 4, 4), 1.0).to_event(3))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(3), obs=x)


def converted() -> nn.Module:
    net = FoldBatch(convolution(), 3)
    to_pyro_module_(net)
    return net


WAYS = {
    "attribute": lambda: Model(FoldBatch(convolution(), 3)),
    "PyroModule[FoldBatch]": lambda: Model(PyroModule[FoldBatch](convolution(), 3)),
    "PyroModule inside": lambda: Model(FoldBatch(PyroModule[nn.Conv2d](1, 2, 3), 3)),
    "to_pyro_module_": lambda: Model(converted()),
    "pyro.module": lambda: VAE(FoldBatch(convolution(), 3)).model,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_param_store_gets_the_parameters(way: str) -> None:
    model, guide = WAYS[way](), VAE(nn.Identity()).guide
    svi = SVI(model, guide, Adam({"lr": 0.1}), loss=IWAE_ELBO(K=4))
    net = model.__self__.net if way == "pyro.module" else model.net
    before = [parameter.detach().clone() for parameter in net.parameters()]
    svi.step(torch.randn(3, 2, 2, 2))
    assert len(before) == 2
    for old, new in zip(before, net.parameters(), strict=True):
        assert not torch.equal(old, new)
    name = "decoder" if way == "pyro.module" else "net"
    names = {name.replace("$$$", ".") for name in pyro.get_param_store()}
    assert names >= {f"{name}.module.bias", f"{name}.module.weight"}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "pyro.module"])
def test_local_parameters(way: str) -> None:
    with pyro.settings.context(module_local_params=True):
        elbo = IWAE_ELBO(K=4)(WAYS[way](), VAE(nn.Identity()).guide)
        elbo(torch.randn(3, 2, 2, 2)).backward()
    gradients = {name.rpartition(".net.")[2]: p.grad for name, p in elbo.named_parameters()}
    assert list(gradients) == ["module.weight", "module.bias"]
    assert all(gradient.abs().min() > 0 for gradient in gradients.values())


class NormalisedVAE(VAE):
    """With BatchNorm in the guide's network and, if so asked, in the model's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(FoldBatch(decoder, 3))
        self.encoder = FoldBatch(nn.Sequential(nn.ConvTranspose2d(2, 1, 3), nn.BatchNorm2d(1)), 3)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.4).to_event(3))


def test_batch_norm_warns_where_it_sees_particles() -> None:
    x = torch.randn(3, 2, 2, 2)
    quiet = NormalisedVAE(convolution())
    IWAE_ELBO(K=4).loss(quiet.model, quiet.guide, x)  # in the encoder alone: warnings are errors here
    loud = NormalisedVAE(nn.Sequential(convolution(), nn.BatchNorm2d(2)))
    with pytest.warns(UserWarning, match="normalises over the particles"):
        IWAE_ELBO(K=4).loss(loud.model, loud.guide, x)
    loud.net.eval()
    IWAE_ELBO(K=4).loss(loud.model, loud.guide, x)
