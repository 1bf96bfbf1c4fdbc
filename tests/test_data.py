"""Images from everywhere as integers: nothing lost, nothing guessed, and clear words where the data do not fit."""

import struct
import zlib
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from arguments import DataArguments
from data import HELD_OUT, DataError, ImageStream, default_test_split, load_split, load_splits
from data.decoding import decoded
from data.images import labels_of
from data.splits import evaluation_split, kind_of_images
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


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_where_pil_cuts_them_off(mode, kind, tmp_path):
    """Pillow's own conversion is shown beside: nearly all of it is white."""
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    PIL.Image.fromarray(levels).save(tmp_path / "deep", kind)
    image = PIL.Image.open(tmp_path / "deep")
    assert (np.asarray(image.convert("L")) == 255).mean() > 0.98
    got, num_levels = decoded(image, 0, "image 0", DataArguments(image_mode=mode), None)
    assert num_levels == 256
    np.testing.assert_array_equal(got, np.broadcast_to(levels >> 8, (len(mode), 64, 64)))
    with pytest.raises(DataError, match="give one of the two"):
        decoded(image, 0, "image 0", DataArguments(image_mode=mode, preserve_input_precision=True), None)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("mode", [None, "L", "RGB"])
def test_levels_without_a_range_are_refused_in_every_mode(dtype, mode, tmp_path):
    PIL.Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(DataError, match="image 7 has PIL mode .*of which no file says the range"):
        decoded(PIL.Image.open(tmp_path / "image.tiff"), 0, "image 7", DataArguments(image_mode=mode), None)


@pytest.mark.parametrize(
    ("shape", "given", "want"),
    [
        ((8, 8, 3), "auto", (3, 8, 8)),
        ((3, 8, 8), "auto", (3, 8, 8)),
        ((5, 7, 1), "auto", (1, 5, 7)),
        ((2, 3, 5), "auto", (2, 3, 5)),
        ((3, 8, 3), "last", (3, 3, 8)),
        ((3, 8, 3), "first", (3, 8, 3)),
        ((9, 8, 7), "last", (7, 9, 8)),
        ((3, 8, 3), "auto", None),
        ((9, 8, 7), "auto", None),
    ],
)
def test_the_channels_of_arrays_are_found_or_asked_for(shape, given, want):
    values, args = RNG.integers(0, 256, shape), DataArguments(array_channels=given)
    if want is None:
        with pytest.raises(DataError, match="give --array_channels first or last"):
            decoded(values.tolist(), 0, "image 0", args, None)
        return
    got, _ = decoded(values.tolist(), 0, "image 0", args, None)
    np.testing.assert_array_equal(got, values if want == shape else np.moveaxis(values, -1, 0))
    assert got.shape == want


@pytest.mark.parametrize("value", ["cat", [1], 0.6, 1.0, True, -2, 3])
def test_what_is_no_class_is_refused_by_its_number(value):
    with pytest.raises(DataError, match=r"--label_column kind: .*image 1 is"):
        labels_of([0, value], 3, "kind")
    assert labels_of([0, None, -1, 2, np.int32(1)], 3, "kind").tolist() == [0, -1, -1, 2, 1]


def pictures_in(folder, count=6):
    folder.mkdir(parents=True)
    for index in range(count):
        picture(4, 4).save(folder / f"{index}.png")
    return folder


def test_folders_with_odd_names_and_what_save_to_disk_wrote(tmp_path, arguments):
    for name in ("a[1]", "b*?", "c d"):
        folder = pictures_in(tmp_path / name)
        assert len(load_split(arguments(train_data_dir=str(folder), eval_fraction=0.2), "train", seed=0)) == 5
    saved = datasets.Dataset.from_dict(
        {"image": [picture(4, 4)] * 5}, features=datasets.Features({"image": datasets.Image()})
    )
    saved.save_to_disk(tmp_path / "saved")  # one split, without a name
    for given in ({"source": str(tmp_path / "saved")}, {"train_data_dir": str(tmp_path / "saved")}):
        assert len(load_split(arguments(**given, eval_split="train"), "train", seed=0)) == 5


def bad_sources(folder):
    """name -> (arguments, what is said)."""
    (folder / "empty").mkdir()
    (folder / "a.csv").write_text("a,b\n1,2\n")
    (folder / "a.zip").write_bytes(b"PK")
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("words")
    return {
        "missing folder": ({"train_data_dir": f"{folder}/none"}, "does not exist"),
        "empty folder": ({"train_data_dir": f"{folder}/empty"}, "cannot be read"),
        "folder of texts": ({"train_data_dir": f"{folder}/texts"}, "texts"),
        "file as folder": ({"train_data_dir": f"{folder}/a.zip"}, "is a file"),
        "csv": ({"source": f"{folder}/a.csv"}, "is a .csv"),
        "zip": ({"source": f"{folder}/a.zip"}, "is a .zip"),
        "broken parquet": ({"source": f"{folder}/broken.parquet"}, "cannot be read"),
        "missing parquet": ({"source": f"{folder}/none.parquet"}, "does not exist"),
        "missing path": ({"source": "./no/such/set"}, "does not exist"),
        "unknown on the Hub": ({"source": "nobody/nothing"}, "cannot be read"),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_cannot_be_read_are_one_sentence(streaming, tmp_path, arguments):
    for name, (given, said) in bad_sources(tmp_path).items():
        args = arguments(**given, streaming=streaming, eval_split="train", shuffle_buffer_size=2)
        with pytest.raises(DataError) as refused:
            ImageStream(args, "train", 0) if streaming else load_split(args, "train", seed=0)
        assert said in str(refused.value), name
        assert "\n" not in str(refused.value)


def test_an_image_of_too_many_pixels_is_refused_at_once(tmp_path, arguments):
    """900 million pixels in a file of a megabyte: Pillow's own guard, and one sentence with the file's name."""
    folder = pictures_in(tmp_path / "bomb")
    parts = [b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(10**6))]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    (folder / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(DataError, match=r"9\.png\) cannot be decoded: Image size \(900000000 pixels\)"):
        load_split(arguments(train_data_dir=str(folder), eval_split="train"), "train", seed=0)


@pytest.mark.parametrize("storage", ["memory", "disk", "stream"])
def test_damaged_images_are_named_by_file_and_left_out_if_allowed(storage, tmp_path, arguments):
    folder = pictures_in(tmp_path / "some", 8)
    for index in (0, 5):
        whole = (folder / f"{index}.png").read_bytes()
        (folder / f"{index}.png").write_bytes(whole[:50])
    want = {np.asarray(PIL.Image.open(folder / f"{k}.png")).tobytes() for k in range(8) if k not in (0, 5)}

    def read(allowed):
        args = arguments(train_data_dir=str(folder), eval_split="train", skip_damaged=allowed)
        if storage == "stream":
            stream = ImageStream(replace(args, streaming=True, shuffle_buffer_size=8), "train", 0)
            return stream(0, 6)[0]
        images = load_split(replace(args, decoded_images=storage), "train", seed=0)
        assert [f"{k}.png" in warning for k, warning in zip((0, 5), images.warnings, strict=True)] == [True, True]
        return images.images

    for allowed in (0, 1):
        with pytest.raises(DataError, match=r"[05]\.png\) cannot be decoded.*--skip_damaged"):
            read(allowed)
    for _ in range(2):  # the second time from the file
        got = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()).tobytes() for image in read(2)]
        assert len(got) == 6 and set(got) == want


def test_held_out_is_said_of_what_is_held_out_alone(tmp_path, arguments):
    assert kind_of_images(DataArguments(), "validation") == "held-out"
    assert kind_of_images(DataArguments(eval_split="train"), "train") == "training"
    assert kind_of_images(DataArguments(), HELD_OUT) == "held-out"
    on_test = DataArguments(train_split="test")
    assert default_test_split(on_test) == "validation"  # not what was trained on
    assert evaluation_split(DataArguments(train_split="validation")) == HELD_OUT
    source = save(tmp_path / "set", [picture(4, 4) for _ in range(8)])
    save(tmp_path / "set", [picture(4, 4) for _ in range(6)], name="test-00000-of-00001.parquet")
    assert default_test_split(arguments(source, train_split="test")) == HELD_OUT


def test_images_that_are_also_among_the_training_images_are_counted():
    digits = {name: load_split(DataArguments(), name, seed=0) for name in ("train", "test")}
    assert digits["train"].first(50).number_among(digits["train"]) == 50
    mixed = replace(digits["test"], images=torch.cat([digits["test"].images[:7], digits["train"].images[-3:]]))
    assert mixed.number_among(digits["train"]) == 3
    assert digits["test"].class_names == tuple("0123456789")
