"""Images from everywhere as integers: nothing lost, nothing guessed, and clear words where the data do not fit."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from config import DataArguments
from data import HELD_OUT, DataError, default_test_split, load_split, load_splits
from sklearn.datasets import load_digits

RNG = np.random.default_rng(0)


def picture(height: int, width: int, mode: str = "RGB") -> PIL.Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    return PIL.Image.fromarray(RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode=mode)


def save(folder, pictures, labels=None, name="train-00000-of-00001.parquet"):
    """A folder with a parquet file, as the Hub keeps data sets."""
    columns = {"pixels": pictures} | ({} if labels is None else {"kind": labels})
    features = {"pixels": datasets.Image()}
    if labels is not None:
        features["kind"] = datasets.ClassLabel(names=["a", "b", "c"])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(folder / "data" / name)
    return str(folder)


@pytest.fixture
def arguments(tmp_path):
    def make(source=None, **values):
        return DataArguments(
            dataset_name=source, cache_dir=str(tmp_path / "cache"), dataloader_num_workers=2, **values
        )

    return make


def test_digits_are_the_promised_split():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    parts = {name: load_split(DataArguments(), name, seed=7) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [1200, 300, 297]
    joined = torch.cat([part.images for part in parts.values()])[:, 0].numpy()
    np.testing.assert_array_equal(joined, digits.images[order])
    np.testing.assert_array_equal(torch.cat([part.labels for part in parts.values()]), digits.target[order])
    train = parts["train"]
    assert (train.images.dtype, train.images.shape[1:], train.num_levels, train.num_classes) == (
        torch.uint8,
        (1, 8, 8),
        17,
        10,
    )
    assert default_test_split(DataArguments()) == "test"
    with pytest.raises(DataError, match="only train, validation, test"):
        load_split(DataArguments(), "dev", seed=0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pixels_arrive_unchanged_whatever_the_channels(mode, tmp_path, arguments):
    pictures = [picture(5, 7, mode) for _ in range(300)]  # more than one chunk of the decoder
    labels = [i % 3 for i in range(300)]
    args = arguments(save(tmp_path / "set", pictures, labels), eval_fraction=0.1)
    train, held_out = load_splits(args, seed=3)
    assert len(held_out) == 30
    assert len(train) == 270
    assert train.num_levels == 256
    assert train.num_classes == 3
    want = {np.asarray(p).tobytes(): label for p, label in zip(pictures, labels, strict=True)}
    got = {}
    for split in (train, held_out):
        for image, label in zip(split.images, split.labels, strict=True):
            pixels = image.permute(1, 2, 0).numpy() if mode != "L" else image[0].numpy()
            got[np.ascontiguousarray(pixels).tobytes()] = int(label)
    assert got == want  # every image once, with its own label


def test_the_held_out_share_is_seeded_and_said(tmp_path, arguments):
    source = save(tmp_path / "set", [picture(4, 4) for _ in range(40)])
    first, again = (load_split(arguments(source), HELD_OUT, seed=1) for _ in range(2))
    other = load_split(arguments(source), HELD_OUT, seed=2)
    assert torch.equal(first.images, again.images)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(first) == 2
    assert "held out, seed 1" in first.name
    assert first.labels is None
    assert default_test_split(arguments(source)) == HELD_OUT
    subset = load_split(arguments(source, max_train_samples=5), "train", seed=1)
    assert len(subset) == 5


def test_a_split_for_evaluation_leaves_training_whole(tmp_path, arguments):
    source = save(tmp_path / "set", [picture(4, 4) for _ in range(6)])
    save(tmp_path / "set", [picture(4, 4) for _ in range(3)], name="test-00000-of-00001.parquet")
    args = arguments(source, eval_split="test")
    assert [len(split) for split in load_splits(args, seed=0)] == [6, 3]
    assert default_test_split(args) == "test"
    with pytest.raises(DataError, match="no split 'dev'"):
        load_split(arguments(source, eval_split="dev"), "dev", seed=0)


def test_a_parquet_file_alone_and_a_folder_of_images(tmp_path, arguments):
    pictures = [picture(4, 6) for _ in range(20)]
    source = save(tmp_path / "set", pictures)
    alone = load_split(arguments(f"{source}/data/train-00000-of-00001.parquet"), "train", seed=0)
    assert alone.images.shape[1:] == (3, 4, 6)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, image in enumerate(pictures):
        image.save(folder / f"{index}.png")
    files = load_split(arguments(train_data_dir=str(folder)), "train", seed=0)
    assert files.images.shape == (19, 3, 4, 6)


def test_mixed_sizes_stop_without_a_resolution(tmp_path, arguments):
    pictures = [picture(8, 8), picture(8, 12), picture(20, 9), *(picture(8, 8) for _ in range(20))]
    source = save(tmp_path / "set", pictures)
    with pytest.raises(DataError, match=r"8x8 with 3 channels.*--resolution"):
        load_split(arguments(source), "train", seed=0)
    args = arguments(source, resolution=6, center_crop=True, eval_fraction=0.01)
    images = torch.cat([split.images for split in load_splits(args, seed=0)])
    assert images.shape == (23, 3, 6, 6)


def test_crops_are_seeded_and_centred_where_held_out(tmp_path, arguments):
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (8, 1))  # 8 high, 40 wide: the crop's place shows in its values
    source = save(tmp_path / "set", [PIL.Image.fromarray(ramp) for _ in range(60)])
    args = arguments(source, resolution=8, eval_fraction=0.2)
    train, held_out = load_splits(args, seed=0)
    assert (held_out.images == torch.from_numpy(ramp[:, 16:24])).all()
    places = {int(image[0, 0, 0]) // 6 for image in train.images}
    assert len(places) > 10
    assert min(places) < 8
    assert max(places) > 24
    assert torch.equal(train.images, load_split(args, "train", seed=0).images)


def test_modes_and_depths(tmp_path, arguments):
    deep = [PIL.Image.fromarray(RNG.integers(0, 65536, (4, 4)).astype(np.uint16)) for _ in range(20)]
    source = save(tmp_path / "deep", deep)
    reduced = load_split(arguments(source), "train", seed=0)
    assert (reduced.num_levels, reduced.images.dtype) == (256, torch.uint8)
    kept = load_split(arguments(source, preserve_input_precision=True), "train", seed=0)
    assert (kept.num_levels, kept.images.dtype) == (65536, torch.int32)
    assert torch.equal(kept.images // 256, reduced.images.int())
    assert kept.images.max() > 255

    mixed = save(tmp_path / "mixed", [picture(4, 4), picture(4, 4, "L"), *(picture(4, 4) for _ in range(20))])
    with pytest.raises(DataError, match="1 channel.*--image_mode"):
        load_split(arguments(mixed), "train", seed=0)
    assert load_split(arguments(mixed, image_mode="L"), "train", seed=0).images.shape[1] == 1

    palette = [picture(4, 4).quantize(16) for _ in range(20)]
    assert load_split(arguments(save(tmp_path / "palette", palette)), "train", seed=0).images.shape[1] == 3
    bilevel = [picture(4, 4, "L").convert("1") for _ in range(20)]
    two = load_split(arguments(save(tmp_path / "two", bilevel)), "train", seed=0)
    assert (two.num_levels, int(two.images.max())) == (2, 1)


def test_columns_are_found_by_feature_or_named(tmp_path, arguments):
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "note": datasets.Value("string")}
    )
    pictures = [picture(4, 4) for _ in range(20)]
    columns = {"left": pictures, "right": pictures[::-1], "note": ["x"] * 20}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    source = str(tmp_path / "set")
    with pytest.raises(DataError, match=r"more than one column \(left, right\)"):
        load_split(arguments(source), "train", seed=0)
    with pytest.raises(DataError, match="the columns are left, right, note"):
        load_split(arguments(source, image_column="middle"), "train", seed=0)
    with pytest.raises(DataError, match=r"image 0 of the split must be an image, or integers"):
        load_split(arguments(source, image_column="note"), "train", seed=0)
    assert load_split(arguments(source, image_column="right"), "train", seed=0).images.shape[1:] == (3, 4, 4)


def test_arrays_of_integers_are_images_too(tmp_path, arguments):
    values = RNG.integers(0, 256, (20, 2, 3, 5))
    features = datasets.Features({"x": datasets.Array3D((2, 3, 5), "uint8")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"x": values.tolist()}, features=features).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    args = arguments(str(tmp_path / "set"), image_column="x", eval_split="train")
    np.testing.assert_array_equal(load_split(args, "train", seed=0).images, values)
