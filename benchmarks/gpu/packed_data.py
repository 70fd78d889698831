"""CIFAR-10 small enough to travel: JPEG records without the head that all of them share.

The head, quantization and Huffman tables, is 623 of the 900 bytes of such an image. `unpack` puts it back, decodes, and
writes the official archive's "binary" folder, which `convnorm_jax.data` reads: in TFDS's order, with the same pixels.
"""

import os
import pathlib

import numpy as np

_START_OF_SCAN, _END = b'\xff\xda', b'\xff\xd9'
PARTS = {'train': ('data_batch_1.bin', 'data_batch_2.bin', 'data_batch_3.bin', 'data_batch_4.bin', 'data_batch_5.bin')}
PARTS['test'] = ('test_batch.bin',)
FOLDER = 'cifar-10-batches-bin'


def pack(data_dir, path):
    """Packs the JPEG copy of CIFAR-10 that `data_dir` holds as TFDS does.

    Raises:
      ValueError: it is not there, or its images do not share their head (as PNG does not).
    """
    from convnorm_jax.data.records import TFDSRecords

    folders = sorted(pathlib.Path(data_dir).glob('cifar10/*/dataset_info.json'))
    if not folders:
        raise ValueError(f'--data={data_dir}: expected a folder with cifar10 in it, prepared by TFDS')
    folder, arrays = folders[-1].parent, {}
    for part in PARTS:
        records = TFDSRecords(str(folder), part).records
        rows = [records[i] for i in range(len(records))]
        heads, scans = zip(*(_split(row['image']) for row in rows))
        arrays.setdefault('head', np.frombuffer(heads[0], np.uint8))
        if set(heads) != {arrays['head'].tobytes()}:
            raise ValueError(f'{folder}: expected JPEG images of one head, all of one encoder and one quality')
        arrays[f'{part}_scans'] = np.frombuffer(b''.join(scans), np.uint8)
        arrays[f'{part}_lengths'] = np.array([len(scan) for scan in scans], np.uint16)
        arrays[f'{part}_labels'] = np.array([row['label'] for row in rows], np.uint8)
        names = folder / 'label.labels.txt'
    provenance = folder / 'PROVENANCE.md'
    arrays['class_names'] = np.frombuffer(names.read_bytes(), np.uint8)
    arrays['provenance'] = np.frombuffer(provenance.read_bytes() if provenance.exists() else b'', np.uint8)
    np.savez(path, **arrays)


def unpack(path, data_dir):
    """Writes the archive's folder into `data_dir`, see above."""
    folder = os.path.join(data_dir, FOLDER)
    os.makedirs(folder)
    with np.load(path) as packed:
        for part, files in PARTS.items():
            images, labels = _decode(packed, part), packed[f'{part}_labels']
            records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)], 1)
            for name, rows in zip(files, np.array_split(records, len(files))):
                rows.tofile(os.path.join(folder, name))
        for name, key in (('batches.meta.txt', 'class_names'), ('PROVENANCE.md', 'provenance')):
            if packed[key].size:
                packed[key].tofile(os.path.join(folder, name))


def _split(jpeg):
    """(head, scan): of one JPEG, up to its coefficients, and these; all of another format is head."""
    start = jpeg.find(_START_OF_SCAN)
    if start < 0:
        return jpeg, b''
    start += 2 + int.from_bytes(jpeg[start + 2 : start + 4], 'big')
    end = jpeg.rindex(_END)
    return jpeg[:start], jpeg[start:end]


def _decode(packed, part):
    """uint8 [N, H, W, 3], by OpenCV, as TFDS decodes."""
    import cv2

    head, scans = packed['head'].tobytes(), packed[f'{part}_scans'].tobytes()
    ends = np.cumsum(packed[f'{part}_lengths'], dtype=np.int64)
    starts = ends - packed[f'{part}_lengths']
    images = []
    for start, end in zip(starts, ends):
        jpeg = np.frombuffer(head + scans[start:end] + _END, np.uint8)
        images.append(cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    return np.stack(images)
