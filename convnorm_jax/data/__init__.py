"""Data sets as arrays, their splits, augmentation, and the order of examples.

- ``sources``: a data set's name -> uint8 images and int32 labels, in memory or streamed
- ``location``: where a data set lies on the disk
- ``splits``: training / validation / test, subsets, label noise, and the record that reproduces them
- ``augment``: crop, flip, normalize: pure JAX functions on the device
- ``diffaugment``: differentiable augmentation of what a discriminator sees
- ``corruptions``: the fifteen common corruptions, on the host
- ``pipeline``: which examples make up which batch, as a pure function of (seed, epoch)
- ``images``: decoding and torchvision's crops, on the host
- ``records``: class folders and ArrayRecords of encoded images
- ``archives``: the official CIFAR archives
- ``streaming``: images that grain prefetches while a net trains
- ``cache``: decoded data sets as .npy files

A leaf: nothing here imports another part of convnorm_jax.
"""
