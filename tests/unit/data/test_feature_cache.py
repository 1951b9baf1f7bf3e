"""The store of vision features: what is written is read, and nothing half-written, damaged or foreign is."""

import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from llava_saep.data.feature_cache import FeatureStore, ImageFeatures, num_bytes
from llava_saep.data.images import ImageSize
from llava_saep.errors import UserError


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"never opened")
    return path


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "cache", {"tower": "clip"})
    store.open()
    return store


def make_features(value=None, channels=8, dtype=torch.float32):
    shape = (2, 3, channels)
    draw = (lambda: torch.randn(shape)) if value is None else (lambda: torch.full(shape, float(value)))
    return ImageFeatures(ImageSize(30, 40), (draw().to(dtype), draw().to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_to_the_last_bit(dtype, store, image):
    written = make_features(dtype=dtype)
    assert store.write(store.look_up(image).key, written)
    read = store.look_up(image).features
    assert read.original_size == written.original_size
    assert len(read.layers) == 2
    for one, other in zip(read.layers, written.layers, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_file_is_as_long_as_foretold(store, image):
    """The announcement of how much disk a run takes; the head of the file is the rest."""
    key = store.look_up(image).key
    features = make_features(channels=10_000, dtype=torch.bfloat16)
    store.write(key, features)
    foretold = num_bytes([layer.shape for layer in features.layers], torch.bfloat16)
    assert foretold == 2 * 2 * 3 * 10_000 * 2
    assert 0 < store.path(key).stat().st_size - foretold < 500


def test_changed_image_is_not_taken_for_the_old_one(store, image):
    store.write(store.look_up(image).key, make_features())
    before = image.stat()
    image.write_bytes(b"never open__")  # as long as before
    assert store.look_up(image).features is None
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.look_up(image).features is not None
    image.write_bytes(b"longer than it was")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.look_up(image).features is None
    with pytest.raises(FileNotFoundError):
        store.look_up(image.with_name("other.jpg"))


def test_other_description_does_not_share(store, image, tmp_path):
    store.write(store.look_up(image).key, make_features())
    same, other = (FeatureStore(tmp_path / "cache", {"tower": name}) for name in ("clip", "siglip"))
    other.open()
    assert same.look_up(image).features is not None
    assert other.look_up(image).features is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "lengthened"])
def test_damaged_file_is_not_read_and_is_written_anew(damage, store, image):
    key = store.look_up(image).key
    store.write(key, make_features())
    path = store.path(key)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-50] ^= 1
    damaged = {"cut": data[:-1], "emptied": b"", "flipped": data, "lengthened": data + b"\0"}[damage]
    path.write_bytes(damaged)
    assert store.look_up(image) == (key, None, True)
    store.write(key, make_features(3))
    assert torch.equal(store.look_up(image).features.layers[0], torch.full((2, 3, 8), 3.0))


def write_again_and_again(folder, image, value):
    store = FeatureStore(folder, {"tower": "clip"})
    key = store.look_up(image).key
    while True:
        store.write(key, make_features(value, channels=20_000))


def test_reader_beside_many_writers_sees_whole_files(store, image, tmp_path):
    """Two processes overwrite the same image's features, and are killed in the middle of it."""
    context = multiprocessing.get_context("fork")
    arguments = [(tmp_path / "cache", image, value) for value in (1, 2)]
    writers = [context.Process(target=write_again_and_again, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    seen = set()
    try:
        deadline = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < deadline or len(seen) == 0:
            lookup = store.look_up(image)
            assert not lookup.is_damaged
            if lookup.features is not None:
                values = torch.cat(lookup.features.layers).unique().tolist()
                assert len(values) == 1
                seen.add(values[0])
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert seen == {1.0, 2.0}
    assert not store.look_up(image).is_damaged


def test_full_disk_is_reported_once_and_leaves_nothing_half_written(store, image, caplog):
    """The system refuses files beyond a size, as it refuses those beyond the disk's end: after a part of the bytes."""
    key = store.look_up(image).key
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        outcomes = [store.write(key, make_features(channels=10_000)) for _ in range(3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert outcomes == [False, False, False]
    assert len(caplog.records) == 1
    assert "Training goes on" in caplog.text
    assert store.look_up(image) == (key, None, False)
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == ["about.json"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_vision_features .*file.*cannot be written to"):
        FeatureStore(tmp_path / "file", {}).open()


def test_what_a_killed_run_left_is_removed_when_it_is_old(store, tmp_path):
    unfinished = store.folder / "unfinished"
    (unfinished / "of_a_run_beside").write_bytes(b"half")
    (unfinished / "of_yesterday").write_bytes(b"half")
    os.utime(unfinished / "of_yesterday", (0, 0))
    FeatureStore(tmp_path / "cache", {"tower": "clip"}).open()
    assert [path.name for path in unfinished.iterdir()] == ["of_a_run_beside"]
