"""Features of pictures: what they are, every picture once, and the kept statistics of the real ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnorm_jax import mesh as mesh_lib
from convnorm_jax.evaluation import features as features_lib
from convnorm_jax.evaluation import inception_weights
from convnorm_jax.evaluation.features import (
    FeatureExtractor,
    classifier_extractor,
    extract,
    generative_scores,
    reference_statistics,
)
from convnorm_jax.evaluation.generative import frechet_distance, inception_score, kernel_distance
from convnorm_jax.evaluation.inception import InceptionV3
from convnorm_jax.models import create_model

MEAN, STD = (0.4,), (0.3,)
N = 27

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def net():
    """(model, variables)."""
    model = create_model('simple_cnn', num_classes=10, layer='convnorm', width=4, depth=(1,))
    return model, jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, 8, 8, 1)))


@pytest.fixture(scope='module')
def extractor(net):
    return classifier_extractor(*net, MEAN, STD)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 8, 8, 1), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'size'), [('simple_cnn', 8), ('resnet18', 8)])
def test_features_of_a_classifier_are_the_input_of_its_last_layer(name, size):
    model = create_model(
        name, num_classes=3, layer='batchnorm', width=2, depth=(1, 1) if name == 'simple_cnn' else None
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(jnp.zeros((1, size, size, 3)))
    found = classifier_extractor(model, variables, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    features, logits = found.compiled(variables, pixels)
    linear = variables['params']['linear']
    np.testing.assert_allclose(features @ linear['kernel'] + linear['bias'], logits, atol=1e-5)
    normalized = (pixels / np.float32(255) - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
    np.testing.assert_allclose(
        logits, jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, normalized), atol=1e-5
    )
    np.testing.assert_allclose(found(pixels / np.float32(255))[0], features, atol=1e-5)


def test_every_picture_once_whatever_the_batch(extractor, images):
    features, logits = extract(extractor, images, N)
    assert features.dtype == logits.dtype == np.float32 and logits.shape == (N, 10)
    done = []
    parts = extract(extractor, images, 8, progress=lambda *counts: done.append(counts))
    np.testing.assert_allclose(parts[0], features, atol=1e-5)
    np.testing.assert_allclose(parts[1], logits, atol=1e-5)
    assert done == [(8, N), (16, N), (24, N), (N, N)]
    mesh = mesh_lib.create_mesh()
    assert mesh.size == 4
    np.testing.assert_allclose(extract(extractor, images, 8, mesh)[0], features, atol=1e-5)
    with pytest.raises(ValueError, match='batch_size=6: expected a multiple of the number of devices, 4'):
        extract(extractor, images, 6, mesh)


def test_extract_compiles_once(images):
    traced = []

    def features_fn(variables, pixels):
        traced.append(pixels.shape)
        flat = pixels.reshape(len(pixels), -1) * variables
        return flat, flat

    counting = FeatureExtractor('flat', '0', features_fn, jnp.float32(2), 'classifier')
    np.testing.assert_array_equal(extract(counting, images, 8)[0], 2.0 * images.reshape(N, -1))
    extract(counting, images[:9], 8)
    assert traced == [(8, 8, 8, 1)]


def test_extract_says_what_it_wants(extractor, images):
    for wrong in (images / 255, images[0], images[:0], [1]):
        with pytest.raises(ValueError, match=r'expected uint8 \[N, H, W, C\] with at least one image'):
            extract(extractor, wrong, 8)


def test_digest_identifies_weights_and_normalization(net, extractor):
    model, variables = net
    assert classifier_extractor(model, variables, MEAN, STD).digest == extractor.digest
    changed = jax.tree.map(lambda a: a, variables)
    changed['params']['linear']['bias'] = variables['params']['linear']['bias'].at[0].add(1)
    others = [(changed, MEAN, STD), (variables, (0.41,), STD), (variables, MEAN, (0.31,))]
    assert len({extractor.digest, *(classifier_extractor(model, *other).digest for other in others)}) == 4


def test_reference_statistics_are_kept(extractor, images, tmp_path):
    features, _ = extract(extractor, images, 8)
    found = reference_statistics(extractor, images, 'digits/train', tmp_path, batch_size=8, sample=9)
    assert found.count == N
    np.testing.assert_allclose(found.mean, features.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(float).T), atol=1e-12)
    np.testing.assert_array_equal(found.sample, features[::3])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith('digits_train-') and extractor.digest[:16] in path.name

    def fail(*_):
        raise AssertionError('computed again')

    kept = dataclasses.replace(extractor, features_fn=fail)
    again = reference_statistics(kept, images, 'digits/train', tmp_path, batch_size=8, sample=9)
    for name, value in dataclasses.asdict(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    # Other pictures, another net, another sample: other files.
    other = dataclasses.replace(extractor, digest='f' * 64)
    reference_statistics(extractor, images[::-1], 'digits/train', tmp_path, batch_size=8, sample=9)
    reference_statistics(other, images, 'digits/train', tmp_path, batch_size=8, sample=9)
    assert len(reference_statistics(extractor, images, 'digits/train', tmp_path, batch_size=8).sample) == N
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_statistics_are_computed_again(extractor, images, tmp_path):
    found = reference_statistics(extractor, images, 'digits', tmp_path, batch_size=8)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    wrong = {**dataclasses.asdict(found), 'covariance': found.covariance[:3]}
    nan = {**dataclasses.asdict(found), 'mean': found.mean * np.nan}
    for damage in (b'', content[:100], content[:-5], content.replace(b'mean.npy', b'neam.npy'), wrong, nan):
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            np.savez(path, **damage)
        with pytest.warns(RuntimeWarning, match='is damaged .* computed again'):
            again = reference_statistics(extractor, images, 'digits', tmp_path, batch_size=8)
        np.testing.assert_array_equal(again.covariance, found.covariance)
        assert path.stat().st_size == len(content)  # repaired


def test_a_folder_that_cannot_be_written(extractor, images, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('CONVNORM_CACHE', str(tmp_path / 'file' / 'folder'))
    with pytest.warns(RuntimeWarning, match='cannot be written'):
        assert reference_statistics(extractor, images, 'digits', batch_size=8).count == N


def test_scores_of_a_classifier_have_names_of_their_own(extractor, images, tmp_path):
    reference = reference_statistics(extractor, images, 'digits', tmp_path, batch_size=8)
    features, logits = extract(extractor, images[:20] // 2, 8)
    scores = generative_scores(extractor, features, logits, reference, splits=2, subsets=3)
    names = ['fid_classifier', 'kid_classifier', 'kid_classifier_std', 'classifier_score', 'classifier_score_std']
    assert list(scores) == names
    cov = np.cov(features.astype(float).T)
    expected = frechet_distance(features.mean(0, float), cov, reference.mean, reference.covariance)
    np.testing.assert_allclose(scores['fid_classifier'], expected, rtol=1e-8)
    assert (scores['kid_classifier'], scores['kid_classifier_std']) == kernel_distance(
        features, reference.sample, 3, 20
    )
    assert (scores['classifier_score'], scores['classifier_score_std']) == inception_score(logits, 2)
    same = generative_scores(extractor, *extract(extractor, images, 8), reference, splits=2, subsets=1)
    assert same['fid_classifier'] < 1e-6 * scores['fid_classifier']


def test_an_inception_by_its_weight_file(monkeypatch):
    # Not run: its figures are in test_inception.py. Found, read and imported, with the preprocessing in its name.
    template = jax.eval_shape(InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))
    monkeypatch.setattr(inception_weights, 'find_weights', lambda path: (path, 'ab' * 32))
    monkeypatch.setattr(inception_weights, 'read_state_dict', lambda path: path)
    monkeypatch.setattr(inception_weights, 'import_weights', lambda state_dict: template)
    first, second = (
        inception_weights.inception_extractor('file', convention) for convention in ('tensorflow1', 'pytorch_fid')
    )
    assert first.score_names == ('fid', 'kid', 'inception_score') and first.name == 'inception2015-tensorflow1'
    assert first.digest != second.digest and len(first.digest) == 64
    features, logits = jax.eval_shape(first.features_fn, template, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    with pytest.raises(ValueError, match=r"preprocessing='torch': expected one of tensorflow1, pytorch_fid"):
        inception_weights.inception_extractor('file', 'torch')
    assert set(features_lib.SCORE_NAMES) == {first.label, 'classifier'}
