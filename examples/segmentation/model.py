"""A small encoder-decoder: five strided stages, each added back on the way up."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SegmentationNet(nn.Module):
    """``(N, 3, H, W)`` images to ``(N, classes, H, W)`` logits, any H and W.

    Stage i works at 1/2**i of the resolution with ``widths[i - 1]`` channels. The finest stage is a single
    convolution: at half resolution every further one would cost as much as a whole coarser stage. The last
    step up is bilinear, as in the networks whose logits come at a stride.

    Args:
        classes: number of logits per pixel.
        widths: channels of the encoder's stages, finest first.
    """

    def __init__(self, classes: int, widths: tuple[int, ...] = (16, 32, 48, 64, 96)):
        super().__init__()
        self.encoder = nn.ModuleList()
        previous = 3
        for stage, width in enumerate(widths):
            layers = [_convolution(previous, width, stride=2)]
            if stage > 0:
                layers.append(_convolution(width, width))
            self.encoder.append(nn.Sequential(*layers))
            previous = width
        self.lateral = nn.ModuleList(
            nn.Conv2d(coarse, fine, 1) for fine, coarse in zip(widths, widths[1:], strict=False)
        )
        self.decoder = nn.ModuleList(_convolution(width, width) for width in widths[:-1])
        self.classifier = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        stages: list[Tensor] = []
        x = images
        for encode in self.encoder:
            x = encode(x)
            stages.append(x)
        for skip, lateral, decode in zip(
            reversed(stages[:-1]), reversed(self.lateral), reversed(self.decoder), strict=True
        ):
            x = decode(skip + _resize(lateral(x), skip.shape[-2:]))
        return _resize(self.classifier(x), images.shape[-2:])


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return interpolate(x, size, mode="bilinear", align_corners=False)
