"""ResNets (He et al. 2016) with the CIFAR stem: 3x3, stride 1, no max-pool. Sizes for 10 classes, width 64, 3 channels:
resnet18 11,173,962, resnet34 21,282,122, resnet50 23,520,842 parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Build the shortcut: empty if the shape does not change, else a 1x1 convolution with batch norm (option B).

    In place of a stride the convolution reads every ``stride``-th pixel (``_every``), which gives the same numbers: a
    strided 1x1 convolution must not meet images that are stored by pixel (``state_dict.channels_last``).
    """
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def _every(x: Tensor, stride: int) -> Tensor:
    """Return maps [B, channels, H, W] at the pixels 0, ``stride``, 2 ``stride`` ... of either axis."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, activation after the sum."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(_every(x, self.stride)))


class Bottleneck(nn.Module):
    """1x1 down to ``width``, 3x3, 1x1 up to 4 ``width``, around a shortcut.

    The 3x3 convolution has the stride, as in torchvision; in the paper the first 1x1 has it.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(_every(x, self.stride)))


def resnet(
    block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], width: int, channels: int
) -> tuple[nn.Module, int]:
    """Build the trunk and return it with its number of features.

    Stages have ``depths`` blocks and widths w, 2w, 4w, 8w. Convolutions are initialised Kaiming-normal over fan-out.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(block(inputs, width << stage, 2 if stage and not index else 1))
            inputs = (width << stage) * block.expansion
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return trunk, inputs
