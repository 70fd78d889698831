"""Small nets of the well-known kinds, in NNX, written as their authors would: without a thought of ConvNorm."""

import jax.numpy as jnp
from flax import nnx

from tests.front_ends.reports import ALONE, CONVNEXT, DECODER, RESNET


class Block(nnx.Module):
    """Of a ResNet; strides 2 with a projection shortcut."""

    def __init__(self, cin, cout, strides, rngs):
        # Made in another order than they are called: names and order say nothing.
        self.bn2 = nnx.BatchNorm(cout, rngs=rngs)
        self.bn1 = nnx.BatchNorm(cout, momentum=0.8, epsilon=1e-3, rngs=rngs)
        self.conv1 = nnx.Conv(cin, cout, (3, 3), strides=strides, padding=1, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(cout, cout, (3, 3), use_bias=False, rngs=rngs)
        self.projects = strides != 1
        if self.projects:
            conv = nnx.Conv(cin, cout, (1, 1), strides=strides, use_bias=False, rngs=rngs)
            self.shortcut = nnx.Sequential(conv, nnx.BatchNorm(cout, rngs=rngs))

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (self.shortcut(x) if self.projects else x))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([Block(4, 4, 1, rngs), Block(4, 8, 2, rngs)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class MobileNet(nnx.Module):
    """An inverted residual; whether it trains is an argument of the call."""

    def __init__(self, rngs):
        self.expand = nnx.Conv(3, 8, (1, 1), use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), strides=2, feature_group_count=8, use_bias=False, rngs=rngs)
        self.project = nnx.Conv(8, 4, (1, 1), use_bias=False, rngs=rngs)
        self.norms = nnx.data({str(i): nnx.BatchNorm(n, rngs=rngs) for i, n in enumerate((8, 8, 4))})
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, train=True):
        norm = lambda i, x: self.norms[str(i)](x, use_running_average=not train)
        x = jnp.clip(norm(0, self.expand(x)), 0, 6)
        x = jnp.clip(norm(1, self.depthwise(x)), 0, 6)
        return self.head(norm(2, self.project(x)).mean((1, 2)))


class ConvNeXt(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (2, 2), strides=2, padding='VALID', rngs=rngs)
        self.stem_norm = nnx.LayerNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (5, 5), feature_group_count=8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem_norm(self.stem(x))
        x += self.narrow(nnx.gelu(self.wide(self.norm(self.depthwise(x)))))
        return self.head(x.mean((1, 2)))


class PreActivation(nnx.Module):
    """A pre-activation ResNet: norms stand before convolutions, and the sums feed norm and shortcut."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn1, self.bn2 = (nnx.BatchNorm(8, rngs=rngs) for _ in range(2))
        self.conv1, self.conv2 = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2))
        self.bn3 = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.conv1(nnx.relu(self.bn1(x)))
        y = self.conv2(nnx.relu(self.bn2(y)))
        return self.head(nnx.relu(self.bn3(x + y)).mean((1, 2)))


class Decoder(nnx.Module):
    """Of an autoencoder, in the way of a list that asks for the types of its layers."""

    def __init__(self, rngs):
        self.encoder = nnx.Sequential(
            nnx.Conv(3, 8, (4, 4), strides=2, padding=1, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu
        )
        self.layers = nnx.List(
            [
                nnx.ConvTranspose(8, 4, (4, 4), strides=(2, 2), rngs=rngs),
                nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs),
                nnx.relu,
                nnx.Conv(4, 3, (1, 1), rngs=rngs),
            ]
        )

    def __call__(self, x, frozen=False):
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x, use_running_average=frozen) if isinstance(layer, nnx.BatchNorm) else layer(x)
        return x.mean((1, 2))


# net: ({convolution: normalization}, {left: reason})
NETS = {
    ResNet: RESNET,
    MobileNet: ({'expand': 'norms/0', 'depthwise': 'norms/1', 'project': 'norms/2'}, {}),
    ConvNeXt: CONVNEXT,
    PreActivation: (
        {'stem': None, 'conv1': 'bn2', 'conv2': None},
        {'bn1': 'the output of stem is used elsewhere, too', 'bn3': ALONE},
    ),
    Decoder: DECODER,
}
