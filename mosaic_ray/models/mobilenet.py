"""MobileNetV2 (Sandler et al. 2018) reduced for images of 28 to 64 pixels."""

from __future__ import annotations

from torch import Tensor, nn

#: Stages as (expansion, channels in units of the width, blocks, stride of the first block). The paper has seven stages,
#: five halvings and expansion 6, for images of 224 pixels.
STAGES = ((1, 1, 1, 1), (4, 2, 2, 2), (4, 3, 2, 2), (4, 4, 2, 2))

#: Features in units of the width, as in resnet18.
FEATURES = 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection without activation; with a shortcut if the shape does not change."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.layers = nn.Sequential(
            *(_convolution(inputs, hidden, 1) if expansion > 1 else []),
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            *_convolution(hidden, outputs, 1)[:2],
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet(width: int, channels: int) -> tuple[nn.Module, int]:
    """Build the trunk; returns it and its number of features.

    At width 16 for 32x32x3 and 10 classes it has 117,930 parameters (resnet18: 701,466) and 9 million multiply-adds
    (resnet18: 35). On a CPU it is bound by memory: a training step takes about as long as with resnet18 (265 against
    245 ms of CPU time, 64 images of 28x28, one run on a shared machine).
    """
    layers, inputs = _convolution(channels, width, 3), width
    for expansion, multiple, depth, stride in STAGES:
        for index in range(depth):
            layers.append(InvertedResidual(inputs, multiple * width, 1 if index else stride, expansion))
            inputs = multiple * width
    layers += _convolution(inputs, FEATURES * width, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), FEATURES * width
