"""Small quantized networks for the tests of `deploy`, which imports no other package."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantizedConv(nn.Module):
    """Conv with fake-quantized input and weights, and SiLU."""

    def __init__(
        self, inputs: int, outputs: int, scale: float = 0.02, stride: int = 1, kernel: int = 3
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.register_buffer("scale", torch.tensor(scale))

    def quantized_input(self, x: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, zero, -128, 127)

    def quantized_weight(self) -> Tensor:
        weight = self.conv.weight.detach()
        scale = weight.abs().amax((1, 2, 3)) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized_weight()
        x = F.conv2d(self.quantized_input(x), weight, self.conv.bias, self.conv.stride, self.conv.padding)
        return F.silu(x)


class ReluResidual(nn.Module):
    """Two ReLU convs with a residual sum and a max-pool; skip and sum are quantized, the branch only on demand."""

    def __init__(self, seed: int = 0, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.entry = QuantizedConv(3, 16, 1 / 127, 2)
        self.first = QuantizedConv(16, 16, 0.004)
        self.second = QuantizedConv(16, 16, 0.003)
        self.exit = QuantizedConv(16, 8, 0.007)
        self.branch = branch

    def forward(self, images: Tensor) -> Tensor:
        x = self.first.quantized_input(F.relu(self._conv(self.entry, self.entry.quantized_input(images))))
        y = self.second.quantized_input(F.relu(self._conv(self.first, x)))
        y = F.relu(self._conv(self.second, y))
        y = self.exit.quantized_input(y) if self.branch else y
        z = F.max_pool2d(self.exit.quantized_input(x + y), 2)
        return self._conv(self.exit, z)

    @staticmethod
    def _conv(module: QuantizedConv, x: Tensor) -> Tensor:
        return F.conv2d(
            x, module.quantized_weight(), module.conv.bias, module.conv.stride, module.conv.padding
        )


class Decode(nn.Module):
    """A box and score head in the shape of a detector's: [B, 4 * 16 + K, h, w] -> [B, 4 + K, h * w], stride 4."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        box, score = x.split([64, channels - 64], 1)
        box = box.view(batch, 4, 16, height * width).softmax(2)
        distance = (box * torch.arange(16.0).view(1, 1, 16, 1)).sum(2)
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.stack([xs.reshape(-1), ys.reshape(-1)]).float() + 0.5
        low, high = centre - distance[:, :2], centre + distance[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], 1) * 4
        return torch.cat([boxes, score.flatten(2).sigmoid()], 1)


class SmallDetector(nn.Module):
    """Two strided convs, a split with two branches on one shared scale, upsampling, a float head, a float decode."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = QuantizedConv(3, 16, 1 / 127, 2)
        self.down = QuantizedConv(16, 32, 0.01, 4)
        self.left = QuantizedConv(16, 32, 0.008)
        self.right = QuantizedConv(16, 32, 0.008)
        self.again = QuantizedConv(64, 32, 0.006)
        self.head = nn.Conv2d(32, 64 + classes, 1)
        self.decode = Decode()

    def network(self, images: Tensor) -> Tensor:
        x = self.down(self.stem(images))
        first, second = x.chunk(2, 1)
        x = torch.cat([self.left(first), self.right(second)], 1)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.head(self.again(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.network(images))


class SplitConcat(nn.Module):
    """An ELAN block: a split tensor and two convs on it meet in one concat, all on one scale, and feed a 1x1 conv."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.entry = QuantizedConv(3, 32, 1 / 127, 2)
        self.first = QuantizedConv(16, 16, 0.02)
        self.second = QuantizedConv(16, 16, 0.02)
        self.exit = QuantizedConv(64, 32, 0.02, kernel=1)

    def forward(self, images: Tensor) -> Tensor:
        shared = self.exit.quantized_input
        x = shared(self.entry(images))
        left, right = x.chunk(2, 1)
        first = shared(F.silu(self._conv(self.first, right)))
        second = shared(F.silu(self._conv(self.second, first)))
        return F.silu(self._conv(self.exit, torch.cat([left, right, first, second], 1)))

    @staticmethod
    def _conv(module: QuantizedConv, x: Tensor) -> Tensor:
        return F.conv2d(x, module.quantized_weight(), module.conv.bias, 1, module.conv.padding)


class FloatDetector(SmallDetector):
    """The same with the quantizers away."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__(classes, seed)
        for module in (self.stem, self.down, self.left, self.right, self.again):
            module.quantized_input = lambda x: x
            module.quantized_weight = lambda module=module: module.conv.weight
