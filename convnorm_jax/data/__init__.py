"""Data sets as arrays, their splits, augmentation, and the order of examples.

sources   a data set's name -> uint8 images and int32 labels in memory
splits    training / validation / test, subsets, label noise, and the record that reproduces them
augment   crop, flip, normalise: pure JAX functions on the device
pipeline  which examples make up which batch, as a pure function of (seed, epoch)
pictures  decoding and torchvision's crops, on the host
stores    class folders and ArrayRecords of encoded pictures
streaming pictures that are read, by grain, while they are needed

A leaf: nothing here imports another part of convnorm_jax.
"""
