"""A convolutional VAE, trained with any bound and estimator.

Two strided convolutions down to a quarter of the height and width, and two transposed ones up again. Under
particles the latents have two batch dims, ``[S, B, latent]``, where a convolution takes one: the decoder is
wrapped in ``FoldBatch``, and nothing else differs from ``vae.py``, whose model, guide and training these
are. Try::

    python examples/conv_vae.py                                # MIWAE(4, 4) on 8×8 digits
    python examples/conv_vae.py --loss iwae --estimator dreg
    python examples/conv_vae.py --data mnist --data-dir data --channels 32 --latent 32

All bounds are reported in nats per datapoint.
"""

from __future__ import annotations

import argparse

import vae
from torch import Tensor, nn

from pyro_iw.nn import FoldBatch
from shared.datasets import ImageData
from shared.networks import VAE
from shared.options import at_smoke_size, positive_int
from shared.running import results_folder

DEFAULTS = {"latent": 16, "M": 4, "K": 4, "epochs": 30, "learning_rate": 2e-3}


class ConvEncoder(nn.Module):
    """q(z | x): the mean and the standard deviation of a diagonal normal, from images ``[B, H·W]``.

    It sees data, which carry no particles, and so needs no folding.
    """

    def __init__(self, height: int, width: int, channels: int, latent: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, height, width)),
            nn.Conv2d(1, channels, 4, stride=2, padding=1),
            nn.ELU(),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(2 * channels * (height // 4) * (width // 4), 2 * latent),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.net(x).chunk(2, -1)
        return loc, log_scale.exp()


def conv_decoder(height: int, width: int, channels: int, latent: int) -> nn.Sequential:
    """Logits ``[B, H·W]`` from latents ``[B, latent]``."""
    coarse = (2 * channels, height // 4, width // 4)
    return nn.Sequential(
        nn.Linear(latent, coarse[0] * coarse[1] * coarse[2]),
        nn.Unflatten(1, coarse),
        nn.ELU(),
        nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
        nn.ELU(),
        nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1),
        nn.Flatten(),
    )


class ConvVAE(VAE):
    """The VAE of ``vae.py`` with other networks.

    Arguments:
        image_shape: Height and width, both divisible by four.
        channels: Of the finer convolution; the coarser one has twice as many.
        latent: The dimension of z.
    """

    def __init__(self, image_shape: tuple[int, int], channels: int, latent: int) -> None:
        height, width = image_shape
        if height % 4 or width % 4:
            raise ValueError(
                f"the images are {height}×{width}, and neither may leave a rest when halved twice"
            )
        super().__init__(height * width, latent)
        self.encoder = ConvEncoder(height, width, channels, latent)
        self.decoder = FoldBatch(conv_decoder(height, width, channels, latent), event_dim=1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = vae.make_parser(__doc__)
    parser.add_argument("--channels", type=positive_int, default=16, help="of the finer convolution")
    parser.set_defaults(**DEFAULTS)
    args = at_smoke_size(parser.parse_args(argv), vae.SMOKE)
    args.out = args.out or results_folder(f"conv-vae-{args.data}-{args.loss}", args.smoke)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)

    def build(data: ImageData, latent: int) -> ConvVAE:
        return ConvVAE(data.image_shape, args.channels, latent)

    return vae.report(args, build)


if __name__ == "__main__":
    main()
