"""The block of the convolutional hosts."""

from torch import Tensor
from torch import nn


class ConvBlock(nn.Module):
    """A depthwise 3 x 3 convolution and a pointwise hidden layer around a residual.

    The shape of MobileNetV2 (arXiv 1801.04381) and ConvNeXt (arXiv 2201.03545). A seed that reads
    the input of ``mlp`` and adds to its output widens the hidden layer exactly.

    Args:
        channels: Channels of input and output.
        hidden: Hidden channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns images of the same shape, [samples, channels, height, width]."""
        changed: Tensor = images + self.mlp(self.spatial(images))
        return changed
