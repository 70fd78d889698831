"""What generated pictures are compared by: features and logits of a net, and their statistics of real pictures.

Two kinds of net. The 2015 Inception (`inception_weights.inception_extractor`) gives FID, KID and IS as
published (arXiv 1706.08500, 1801.01401, 1606.03498), and needs its weight file. A classifier of this project
gives the same formulas without one; their scale is another, which is why those scores have names of their
own: fid_classifier, kid_classifier, classifier_score.
"""

import dataclasses
import functools
import hashlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from convnorm_jax.data.augment import to_float
from convnorm_jax.data.cache import cache_root
from convnorm_jax.data.pipeline import padded_batches
from convnorm_jax.errors import UserError
from convnorm_jax.evaluation import generative
from convnorm_jax.files import write_atomically
from convnorm_jax.mesh import check_batch_size, cut_batch, fetch, replicate
from convnorm_jax.steps.classify import make_logits_fn

# Part of a cached file: raise it when what is stored changes.
_FORMAT = 1

# Parts that the score of the logits is taken over, as published: no fewer images have one.
SPLITS = 10

# label -> names of the Frechet distance, the kernel distance and the score of logits.
SCORE_NAMES = {
    'inception': ('fid', 'kid', 'inception_score'),
    'classifier': ('fid_classifier', 'kid_classifier', 'classifier_score'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A net that pictures are compared by.

    Attributes:
      name: for people and file names.
      digest: hexadecimal, of everything that determines its features.
      features_fn: (variables, pixels [B, H, W, C], uint8 or float in [0, 1]) -> (features [B, D], logits [B, K]).
      variables: of the net; an argument, so that they are no constants of a compiled program.
      label: a key of `SCORE_NAMES`: which scores its features give.
    """

    name: str
    digest: str
    features_fn: Callable
    variables: Any
    label: str

    def __call__(self, pixels):
        """(features, logits) of a batch of pixels."""
        return self.features_fn(self.variables, pixels)

    @property
    def score_names(self):
        """Names of its Frechet distance, its kernel distance and its score of logits."""
        return SCORE_NAMES[self.label]

    @functools.cached_property
    def compiled(self):
        """`features_fn`, jitted; one program for each shape of a batch."""
        return jax.jit(self.features_fn)


def classifier_extractor(model, variables, mean, std, name='classifier'):
    """Features from a classifier of this project: what its last linear layer is given.

    Args:
      model: a net made by `create_model`; variables: of it, trained.
      mean, std: per channel, of pixels in [0, 1], that the net was trained with.
      name: of the extractor.

    Returns:
      A `FeatureExtractor` of the label 'classifier'.
    """
    logits_fn = make_logits_fn(model, tuple(mean), tuple(std))

    def features_fn(variables, pixels):
        inputs = []

        def record(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense) and context.method_name == '__call__':
                inputs.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            logits = logits_fn(variables, to_float(pixels) if pixels.dtype == jnp.uint8 else pixels)
        if not inputs:
            raise UserError(f'{type(model).__name__}: expected a net with a linear layer at its end, it has none')
        return inputs[-1].astype(jnp.float32), logits

    facts = [repr(model), repr([float(m) for m in mean]), repr([float(s) for s in std])]
    return FeatureExtractor(name, _digest(facts, variables), features_fn, variables, 'classifier')


def _digest(facts, variables):
    digest = hashlib.sha256('\n'.join(facts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def extract(extractor, images, batch_size, mesh=None, progress=None):
    """Features and logits of many pictures.

    Args:
      extractor: a `FeatureExtractor`.
      images: uint8 [N, H, W, C], NumPy. Scores are of pictures as they would be stored: round
        generated pixels to 256 levels first.
      batch_size: pictures at a time; the last batch is filled up.
      mesh: devices that a batch is cut over; None for the default device.
      progress: called with (done, total) after every batch.

    Returns:
      (features [N, D], logits [N, K]), float32 NumPy.

    Raises:
      ValueError: no pictures, not uint8 [N, H, W, C], or a batch that does not divide over the devices.
    """
    parts = zip(*_feature_batches(extractor, images, batch_size, mesh, progress))
    return tuple(np.concatenate(part) for part in parts)


def _feature_batches(extractor, images, batch_size, mesh, progress):
    """Yields (features, logits) of each batch, NumPy float32."""
    _check_images(images)
    variables = extractor.variables
    if mesh is not None:
        check_batch_size(batch_size, mesh, 'batch_size')
        variables = replicate(mesh, variables)
    done = 0
    for indices, mask in zip(*padded_batches(len(images), batch_size)):
        batch = images[indices] if mesh is None else cut_batch(mesh, images[indices])
        count = int(mask.sum())
        features, logits = fetch(extractor.compiled(variables, batch))
        yield features[:count].astype(np.float32), logits[:count].astype(np.float32)
        done += count
        if progress:
            progress(done, len(images))


def _check_images(images):
    if getattr(images, 'ndim', 0) != 4 or images.dtype != np.uint8 or not len(images):
        given = f'{getattr(images, "dtype", type(images).__name__)} {getattr(images, "shape", "")}'
        raise UserError(
            f'images: {given}: expected uint8 [N, H, W, C] with at least one picture; '
            'round pixels in [0, 1] by (255 * pixels).round().astype(numpy.uint8)'
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """What generated pictures are compared with.

    Attributes:
      mean, covariance: of the features, float64 [D], [D, D].
      count: number of pictures.
      sample: features of some of them, float32 [n, D], evenly spaced over the data set's order.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    sample: np.ndarray


def reference_statistics(
    extractor, images, name, folder=None, *, batch_size=100, mesh=None, sample=10_000, progress=None
):
    """Statistics of the features of real pictures, computed once and kept in a file.

    The file is named by the data set, the hash of its pictures and the extractor's digest. One that
    is damaged gives a warning and is computed again, as does a folder that cannot be written.

    Args:
      extractor, images, batch_size, mesh, progress: see `extract`.
      name: of the data set and split.
      folder: of the files; None for $CONVNORM_CACHE, else ~/.cache/convnorm_jax.
      sample: features to keep for the kernel distance, all where there are fewer.

    Returns:
      A `ReferenceStatistics`.

    Raises:
      ValueError: as `extract`; fewer than two pictures; features that are not finite.
    """
    _check_images(images)
    pictures = hashlib.sha256(repr(images.shape).encode())
    pictures.update(np.ascontiguousarray(images).data)
    key = f'{name}-{pictures.hexdigest()[:16]}-{extractor.name}-{extractor.digest[:16]}-{_FORMAT}-{sample}'
    path = (cache_root() if folder is None else Path(folder)) / f'{key.replace("/", "_")}.npz'
    cached = _read_statistics(path, len(images), min(sample, len(images)))
    if cached is not None:
        return cached
    statistics, chosen, start = generative.FeatureStatistics(), [], 0
    wanted = np.arange(min(sample, len(images))) * len(images) // max(min(sample, len(images)), 1)
    for features, _ in _feature_batches(extractor, images, batch_size, mesh, progress):
        statistics.update(features)
        inside = wanted[(wanted >= start) & (wanted < start + len(features))]
        chosen.append(features[inside - start])
        start += len(features)
    found = ReferenceStatistics(statistics.mean, statistics.covariance, statistics.count, np.concatenate(chosen))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **dataclasses.asdict(found)))
    except OSError as error:
        warnings.warn(
            f'{path}: cannot be written ({error.strerror}), the statistics will be computed again the next time; '
            'set CONVNORM_CACHE to a writable folder',
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _read_statistics(path, count, sample):
    """The statistics in a file, or None where they cannot be had."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = ReferenceStatistics(file['mean'], file['covariance'], int(file['count']), file['sample'])
        size = found.mean.size
        shapes = [found.mean.shape, found.covariance.shape, found.count, found.sample.shape]
        if shapes != [(size,), (size, size), count, (sample, size)]:
            raise ValueError(f'it holds shapes {shapes}')
        if not all(np.isfinite(a).all() for a in (found.mean, found.covariance, found.sample)):
            raise ValueError('its numbers are not finite')
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = ' '.join(str(error).split())
        warnings.warn(f'{path} is damaged ({reason}); the statistics are computed again', RuntimeWarning, stacklevel=3)
        return None


def generative_scores(extractor, features, logits, reference, *, splits=SPLITS, subsets=100, subset_size=1000, seed=0):
    """All scores of generated pictures, by the names that the extractor's net allows.

    Args:
      extractor: what `features` and `logits` of the generated pictures, and `reference`, come from.
      features: [N, D]; logits: [N, K]; reference: a `ReferenceStatistics`.
      splits, subsets, subset_size, seed: see `generative`; a subset is never larger than the smaller set.

    Returns:
      Floats by name: of the Inception fid, kid, kid_std, inception_score, inception_score_std, of a
      classifier fid_classifier, kid_classifier, kid_classifier_std, classifier_score, classifier_score_std.

    Raises:
      ValueError: too few pictures, features of another extractor, or numbers that are not finite.
    """
    frechet, kernel, score = extractor.score_names
    statistics = generative.FeatureStatistics()
    statistics.update(features)
    subset_size = min(subset_size, len(features), len(reference.sample))
    results = {
        frechet: generative.frechet_distance(
            statistics.mean, statistics.covariance, reference.mean, reference.covariance
        )
    }
    results[kernel], results[f'{kernel}_std'] = generative.kernel_distance(
        features, reference.sample, subsets, subset_size, seed
    )
    results[score], results[f'{score}_std'] = generative.inception_score(logits, splits)
    return results
