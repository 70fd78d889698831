"""Small nets of the well-known kinds, in Equinox, written as their authors would: without a thought of ConvNorm."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.front_ends.reports import ALONE, CONVNEXT, DECODER, RESNET

conv, linear = eqx.nn.Conv2d, eqx.nn.Linear


def norm(channels, **options):
    return eqx.nn.BatchNorm(channels, axis_name='batch', mode='batch', **options)


class Block(eqx.Module):
    """Of a ResNet; stride 2 with a projection shortcut."""

    bn2: eqx.nn.BatchNorm
    bn1: eqx.nn.BatchNorm
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Sequential | None

    def __init__(self, cin, cout, stride, key):
        keys = jax.random.split(key, 3)
        self.bn2, self.bn1 = norm(cout), norm(cout, momentum=0.8, eps=1e-3)
        self.conv1 = conv(cin, cout, 3, stride, padding=1, use_bias=False, key=keys[0])
        self.conv2 = conv(cout, cout, 3, padding='SAME', use_bias=False, key=keys[1])
        project = lambda: [conv(cin, cout, 1, stride, use_bias=False, key=keys[2]), norm(cout)]
        self.shortcut = None if stride == 1 else eqx.nn.Sequential(project())

    def __call__(self, x, state):
        y, state = self.bn1(self.conv1(x), state)
        y, state = self.bn2(self.conv2(jax.nn.relu(y)), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem, self.norm = conv(3, 4, 3, padding=1, key=keys[0]), norm(4)
        self.blocks = [Block(4, 4, 1, keys[1]), Block(4, 8, 2, keys[2])]
        self.head = linear(8, 3, key=keys[3])

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


class MobileNet(eqx.Module):
    """An inverted residual, one `Sequential`."""

    layers: eqx.nn.Sequential
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        relu6 = eqx.nn.Lambda(jax.nn.relu6)
        self.layers = eqx.nn.Sequential(
            [
                *(conv(3, 8, 1, use_bias=False, key=keys[0]), norm(8), relu6),
                *(conv(8, 8, 3, 2, padding=1, groups=8, use_bias=False, key=keys[1]), norm(8), relu6),
                *(conv(8, 4, 1, use_bias=False, key=keys[2]), norm(4)),
            ]
        )
        self.head = linear(4, 3, key=keys[3])

    def __call__(self, x, state):
        x, state = self.layers(x, state)
        return self.head(x.mean((1, 2))), state


class ConvNeXt(eqx.Module):
    """Without state; its LayerNorms are mapped over the pixels."""

    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    stem_norm: eqx.nn.LayerNorm
    norm: eqx.nn.LayerNorm
    wide: eqx.nn.Linear
    narrow: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.stem = conv(3, 8, 2, 2, key=keys[0])
        self.depthwise = conv(8, 8, 5, padding=2, groups=8, key=keys[1])
        self.stem_norm, self.norm = eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)
        self.wide, self.narrow = linear(8, 16, key=keys[2]), linear(16, 8, key=keys[3])
        self.head = linear(8, 3, key=keys[4])

    def __call__(self, x):
        each = lambda layer: jax.vmap(jax.vmap(layer, 1, 1), 2, 2)
        x = each(self.stem_norm)(self.stem(x))
        x += each(lambda x: self.narrow(jax.nn.gelu(self.wide(x))))(each(self.norm)(self.depthwise(x)))
        return self.head(x.mean((1, 2)))


class PreActivation(eqx.Module):
    """A pre-activation ResNet: norms stand before convolutions, and the sums feed norm and shortcut."""

    stem: eqx.nn.Conv2d
    convs: list
    norms: tuple
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stem = conv(3, 8, 3, padding=1, key=keys[0])
        self.convs = [conv(8, 8, 3, padding=1, key=k) for k in keys[1:3]]
        self.norms = tuple(norm(8) for _ in range(3))
        self.head = linear(8, 3, key=keys[3])

    def __call__(self, x, state):
        x = y = self.stem(x)
        for layer, norm in zip(self.convs, self.norms[:2]):
            y, state = norm(y, state)
            y = layer(jax.nn.relu(y))
        y, state = self.norms[2](x + y, state)
        return self.head(jax.nn.relu(y).mean((1, 2))), state


class Decoder(eqx.Module):
    """A list that is asked for the types of its layers, as in Equinox's example of a DCGAN."""

    encoder: eqx.nn.Sequential
    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        down = conv(3, 8, 4, 2, padding=1, key=keys[0])
        self.encoder = eqx.nn.Sequential([down, norm(8), eqx.nn.Lambda(jax.nn.relu)])
        self.layers = [
            eqx.nn.ConvTranspose2d(8, 4, 4, 2, padding=1, key=keys[1]),
            norm(4, channelwise_affine=False),
            jax.nn.relu,
            conv(4, 3, 1, key=keys[2]),
            jnp.ravel,
        ]

    def __call__(self, x, state):
        x, state = self.encoder(x, state)
        for layer in self.layers:
            if isinstance(layer, eqx.nn.BatchNorm):
                x, state = layer(x, state)
            else:
                x = layer(x)
        return x.reshape(3, -1).mean(1), state


# net: ({convolution: normalization}, {left: reason})
NETS = {
    ResNet: RESNET,
    MobileNet: ({f'layers/layers/{i}': f'layers/layers/{i + 1}' for i in (0, 3, 6)}, {}),
    ConvNeXt: CONVNEXT,
    PreActivation: (
        {'stem': None, 'convs/0': 'norms/1', 'convs/1': None},
        {'norms/0': 'the output of stem is used elsewhere, too', 'norms/2': ALONE},
    ),
    Decoder: DECODER,
}
