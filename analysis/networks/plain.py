"""The three networks that timm lacks: one affine layer, an MLP, and a VGG without normalisation.

They have timm's interface (``forward_features``, ``forward_head``, ``get_classifier``), so that
all architectures are run in one way. MLP and VGG are rectified linear: positively homogeneous in
their parameters but for the biases.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional


class PlainNetwork(nn.Module, ABC):
    """A chain of affine layers; subclasses say how they are joined.

    Attributes:
        head: the last affine layer; an identity where no classes are asked for.
    """

    head: nn.Module

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """The input of the last affine layer, N x width, from N x channels x H x W."""

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, N x classes; the features themselves if `pre_logits`."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N x classes."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last affine layer."""
        return self.head

    def affine_layers(self) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
        """Name and module of every affine layer, from input to output."""
        return [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]


def _head(width: int, classes: int, bias: bool) -> nn.Module:
    return nn.Linear(width, classes, bias=bias) if classes else nn.Identity()


class LinearClassifier(PlainNetwork):
    """One affine layer on pixels.

    Args:
        in_chans: colour channels.
        img_size: pixels along a side.
        num_classes: classes.
        bias: whether it has one.
    """

    def __init__(
        self, in_chans: int, img_size: int, num_classes: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.head = _head(in_chans * img_size**2, num_classes, bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """The pixels, N x (channels · H · W)."""
        return images.flatten(1)


class MLP(PlainNetwork):
    """Fully connected layers with rectifiers between them.

    Args:
        in_chans: colour channels.
        img_size: pixels along a side.
        widths: of the hidden layers.
        num_classes: classes.
        bias: whether the layers have biases; without, the network is homogeneous.
    """

    def __init__(
        self,
        in_chans: int,
        img_size: int,
        widths: Sequence[int] = (128, 64),
        num_classes: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = [in_chans * img_size**2, *widths]
        self.hidden = nn.ModuleList(
            nn.Linear(n, m, bias=bias) for n, m in itertools.pairwise(sizes)
        )
        self.head = _head(sizes[-1], num_classes, bias)
        _initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Activations of the last hidden layer, N x width."""
        value = images.flatten(1)
        for layer in self.hidden:
            value = functional.relu(layer(value))
        return value


class VGG(PlainNetwork):
    """Pairs of 3 x 3 convolutions and pooling, then one hidden layer; no normalisation.

    Source: Simonyan and Zisserman, arXiv:1409.1556, at a small size.

    Args:
        in_chans: colour channels.
        channels: of each stage; a stage halves height and width.
        hidden: width of the fully connected layer.
        num_classes: classes.
        bias: whether the layers have biases; without, the network is homogeneous.
    """

    def __init__(
        self,
        in_chans: int = 3,
        channels: Sequence[int] = (16, 32, 48),
        hidden: int = 64,
        num_classes: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = [in_chans, *channels]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(width, m, kernel_size=3, padding=1, bias=bias) for width in (n, m)
            )
            for n, m in itertools.pairwise(sizes)
        )
        self.hidden = nn.Linear(sizes[-1], hidden, bias=bias)
        self.head = _head(hidden, num_classes, bias)
        _initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Activations of the hidden layer, N x width."""
        value = images
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]  # a ModuleList, seen as a Module
                value = functional.relu(layer(value))
            value = functional.max_pool2d(value, kernel_size=2, ceil_mode=True)
        return functional.relu(self.hidden(value.mean(dim=(2, 3))))


def _initialise(network: PlainNetwork) -> None:
    """He's initial weights, without which a deep network of rectifiers hardly starts to learn.

    Source: He et al., arXiv:1502.01852, equation 10.
    """
    for _, layer in network.affine_layers():
        fan_in = math.prod(layer.weight.shape[1:])
        gain = 1.0 if layer is network.head else 2.0
        nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


PLAIN: dict[str, Callable[..., PlainNetwork]] = {
    "linear": LinearClassifier,
    "mlp": MLP,
    "vgg": VGG,
}

__all__ = ["MLP", "PLAIN", "VGG", "LinearClassifier", "PlainNetwork"]
