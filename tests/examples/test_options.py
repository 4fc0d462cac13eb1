"""The options of the examples: every loss is the bound of its name at one budget, and help says defaults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shared import options
from shared.networks import VAE


@pytest.mark.parametrize("loss", options.LOSSES)
def test_every_loss_spends_the_same_budget(loss: str) -> None:
    network = VAE(6, latent=2, hidden=3)
    particles = options.make_loss(loss, M=3, K=5).particles(network.model, network.guide, torch.ones(4, 6))
    assert particles.log_weights.shape == (15, 4)


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        ("elbo", lambda w: w.mean(0)),
        ("iwae", lambda w: w.exp().mean(0).log()),
        ("miwae", lambda w: w.reshape(3, 5, -1).exp().mean(1).log().mean(0)),
        ("ciwae", lambda w: 0.2 * w.mean(0) + 0.8 * w.exp().mean(0).log()),
        ("vr", lambda w: (0.3 * w).exp().mean(0).log() / 0.3),
        # Partitions at β = 0 and 0.025: the mean of w, and that under its 0.025th power.
        ("tvo", lambda w: 0.025 * w.mean(0) + 0.975 * ((0.025 * w).softmax(0) * w).sum(0)),
    ],
)
def test_losses_are_what_their_names_say(loss: str, bound: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = VAE(6, latent=2, hidden=3).double()
    images = torch.bernoulli(torch.full((4, 6), 0.5, dtype=torch.float64))
    elbo = options.make_loss(loss, M=3, K=5, beta=0.2, alpha=0.7, partitions=2)
    torch.manual_seed(1)
    value = -elbo.loss(network.model, network.guide, images)
    torch.manual_seed(1)
    weights = elbo.particles(network.model, network.guide, images).log_weights.detach()
    assert weights.std() > 0.05
    assert value == pytest.approx(bound(weights).sum().item(), rel=1e-9)


def test_piwae_gets_m_and_k_the_right_way_round() -> None:
    bound = options.make_loss("piwae", M=3, K=5).bound
    assert (bound.M, bound.K) == (3, 5)


def test_help_says_defaults_once() -> None:
    parser = options.new_parser("First.\n\nSecond.")
    parser.add_argument("--size", default=3, help="a number")
    parser.add_argument("--other", help="by mode (default: 1 or 2)")
    parser.add_argument("--none", help="no default")
    text = parser.format_help()
    assert "First." in text
    assert "Second" not in text
    assert "a number (default: 3)" in text
    assert text.count("default:") == 2


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match="miwae"):
        options.make_loss("vimco")


def test_backward_particles_reach_the_loss() -> None:
    parser = options.new_parser("")
    options.add_loss_options(parser)
    assert options.loss_of(parser.parse_args([])).backward_particles is None
    assert options.loss_of(parser.parse_args(["--backward-particles", "3"])).backward_particles == 3
