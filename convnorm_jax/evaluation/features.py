"""Features and logits of a net, and their statistics over real images, with which generated images are compared.

There are two kinds of net. The 2015 Inception (`inception_weights.inception_extractor`) gives FID, KID and IS as
published (arXiv 1706.08500, 1801.01401, 1606.03498), and needs its weight file. A classifier of this package
gives the same formulas without that file. Its scores have another scale, and therefore names of their own:
fid_classifier, kid_classifier, classifier_score.
"""

import dataclasses
import functools
import hashlib
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
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

# Part of the name of a cached file: raise it when the content changes.
_FORMAT = 1

# Parts of the published score of logits; it needs at least this many images.
SPLITS = 10

# Label of an extractor -> names of its Frechet distance, its kernel distance and its score of logits.
SCORE_NAMES = {
    'inception': ('fid', 'kid', 'inception_score'),
    'classifier': ('fid_classifier', 'kid_classifier', 'classifier_score'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A net whose features images are compared by.

    Attributes:
      name: for people and file names.
      digest: hexadecimal, of everything that determines the features.
      features_fn: (variables, pixels [B, H, W, C], uint8 or float in [0, 1]) -> (features [B, D], logits [B, K]).
      variables: of the net; an argument of `features_fn`, so that they are not constants of a compiled program.
      label: a key of `SCORE_NAMES`, which names the scores.
    """

    name: str
    digest: str
    features_fn: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    variables: Any
    label: str

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(features, logits) of a batch of pixels."""
        return self.features_fn(self.variables, pixels)

    @property
    def score_names(self) -> tuple[str, str, str]:
        """Names of the Frechet distance, the kernel distance and the score of logits."""
        return SCORE_NAMES[self.label]

    @functools.cached_property
    def compiled(self) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
        """`features_fn`, jitted: one program for each shape of a batch."""
        return jax.jit(self.features_fn)


def classifier_extractor(
    model: nn.Module, variables: Any, mean: Sequence[float], std: Sequence[float], name: str = 'classifier'
) -> FeatureExtractor:
    """Makes an extractor from a classifier of this package: the features are the inputs of its last linear layer.

    Args:
      model: a net made by `create_model`.
      variables: of the trained net.
      mean: of each channel, of pixels in [0, 1], as in the net's training.
      std: of each channel, of pixels in [0, 1], as in the net's training.
      name: of the extractor.

    Returns:
      A `FeatureExtractor` with the label 'classifier'.

    Raises:
      ValueError: when it is called, if the net has no linear layer.
    """
    logits_fn = make_logits_fn(model, tuple(mean), tuple(std))

    def features_fn(variables: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs: list[jax.Array] = []

        def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, nn.Dense) and context.method_name == '__call__':
                inputs.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            logits = logits_fn(variables, to_float(pixels) if pixels.dtype == jnp.uint8 else pixels)
        if not inputs:
            raise UserError(f'{type(model).__name__}: expected a net that ends in a linear layer, but it has none')
        return inputs[-1].astype(jnp.float32), logits

    facts = [repr(model), repr([float(m) for m in mean]), repr([float(s) for s in std])]
    return FeatureExtractor(name, _digest(facts, variables), features_fn, variables, 'classifier')


def _digest(facts: Sequence[str], variables: Any) -> str:
    digest = hashlib.sha256('\n'.join(facts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def extract(
    extractor: FeatureExtractor,
    images: np.ndarray,
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of many images.

    Args:
      extractor: the net.
      images: uint8 [N, H, W, C], NumPy. Scores are of images as they would be stored, so generated pixels are
        rounded to 256 levels first.
      batch_size: images at a time; the last batch is padded.
      mesh: devices that a batch is divided over; None for the default device.
      progress: called with (done, total) after every batch.

    Returns:
      (features [N, D], logits [N, K]), float32 NumPy.

    Raises:
      ValueError: no images, not uint8 [N, H, W, C], or a batch size that the number of devices does not divide.
    """
    features, logits = zip(*_feature_batches(extractor, images, batch_size, mesh, progress))
    return np.concatenate(features), np.concatenate(logits)


def _feature_batches(
    extractor: FeatureExtractor,
    images: np.ndarray,
    batch_size: int,
    mesh: jax.sharding.Mesh | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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


def _check_images(images: Any) -> None:
    if getattr(images, 'ndim', 0) != 4 or images.dtype != np.uint8 or not len(images):
        given = f'{getattr(images, "dtype", type(images).__name__)} {getattr(images, "shape", "")}'
        raise UserError(
            f'images: {given}: expected uint8 [N, H, W, C] with at least one image; '
            'convert pixels in [0, 1] by (255 * pixels).round().astype(numpy.uint8)'
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Statistics of real images, which generated images are compared with.

    Attributes:
      mean: of the features, float64 [D].
      covariance: of the features, float64 [D, D].
      count: number of images.
      sample: features of some of them, float32 [n, D], evenly spaced over the data set's order.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    sample: np.ndarray


def reference_statistics(
    extractor: FeatureExtractor,
    images: np.ndarray,
    name: str,
    folder: str | Path | None = None,
    *,
    batch_size: int = 100,
    mesh: jax.sharding.Mesh | None = None,
    sample: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceStatistics:
    """Computes the statistics of the features of real images once, and caches them in a file.

    The file is named by the data set, the hash of its images and the extractor's digest. A damaged file
    gives a warning and is computed again; so does a folder that cannot be written.

    Args:
      extractor: see `extract`.
      images: see `extract`.
      name: of the data set and split.
      folder: of the files; None for $CONVNORM_CACHE, else ~/.cache/convnorm_jax.
      batch_size: see `extract`.
      mesh: see `extract`.
      sample: number of features to keep for the kernel distance; all if there are fewer.
      progress: see `extract`.

    Returns:
      The statistics.

    Raises:
      ValueError: see `extract`; fewer than two images; features that are not finite.
    """
    _check_images(images)
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    key = f'{name}-{digest.hexdigest()[:16]}-{extractor.name}-{extractor.digest[:16]}-{_FORMAT}-{sample}'
    path = (cache_root() if folder is None else Path(folder)) / f'{key.replace("/", "_")}.npz'
    cached = _read_statistics(path, len(images), min(sample, len(images)))
    if cached is not None:
        return cached
    statistics, start = generative.FeatureStatistics(), 0
    chosen: list[np.ndarray] = []
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


def _read_statistics(path: Path, count: int, sample: int) -> ReferenceStatistics | None:
    """The statistics in a file, or None if it is missing or damaged."""
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


def generative_scores(
    extractor: FeatureExtractor,
    features: np.ndarray,
    logits: np.ndarray,
    reference: ReferenceStatistics,
    *,
    splits: int = SPLITS,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """All scores of generated images, under the names that the extractor's label gives them.

    Args:
      extractor: the net of `features`, `logits` and `reference`.
      features: of the generated images, [N, D].
      logits: of the generated images, [N, K].
      reference: of the real images.
      splits: see `generative.inception_score`.
      subsets: see `generative.kernel_distance`.
      subset_size: see `generative.kernel_distance`; never larger than the smaller set.
      seed: see `generative.kernel_distance`.

    Returns:
      Scores by name: for the Inception fid, kid, kid_std, inception_score, inception_score_std; for a
      classifier fid_classifier, kid_classifier, kid_classifier_std, classifier_score, classifier_score_std.

    Raises:
      ValueError: too few images, features of another extractor, or numbers that are not finite.
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
