"""What a report of `convnormalize` says, and what it is to say of nets that both libraries have."""

ALONE = 'its input is not the output of a convolution'

# ({convolution: normalization}, {left: reason})
RESNET = (
    {
        'stem': 'norm',
        'blocks/0/conv1': 'blocks/0/bn1',
        'blocks/0/conv2': 'blocks/0/bn2',
        'blocks/1/conv1': 'blocks/1/bn1',
        'blocks/1/conv2': 'blocks/1/bn2',
        'blocks/1/shortcut/layers/0': 'blocks/1/shortcut/layers/1',
    },
    {},
)
CONVNEXT = ({'stem': None, 'depthwise': None}, {})
DECODER = ({'encoder/layers/0': 'encoder/layers/1', 'layers/0': 'layers/1', 'layers/3': None}, {})


def left(report):
    """{path: reason}"""
    return {entry.path: entry.reason for entry in report.left}


def pairs(report):
    """{convolution: normalization}"""
    return {entry.path: entry.norm for entry in report.replaced}
