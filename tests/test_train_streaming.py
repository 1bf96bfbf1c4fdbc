"""Images that are streamed, mapped from a file, or that cannot be decoded."""

import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from arguments import DataArguments, parse_arguments
from data import DataError, load_split
from data.storage import keeps_on_disk, mapped_images
from data.streaming import ImageStream, first_images
from randomness import DataOrder
from run.records import Batches
from safetensors.torch import load_file

NUM_IMAGES = 37


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def pixels():
    """Image k shows k in its first pixel."""
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8), dtype=np.uint8)
    images[:, 0, 0] = np.arange(NUM_IMAGES)
    return images


def save(folder, files):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    split = datasets.Dataset.from_dict(
        {"image": files, "label": [k % 2 for k in range(len(files))]}, features=features
    )
    datasets.DatasetDict({"train": split, "test": split.select(range(min(9, len(files))))}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def folder(pixels, tmp_path_factory):
    return save(tmp_path_factory.mktemp("data") / "saved", [png(image) for image in pixels])


@pytest.fixture
def args(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.NUM_LOCAL_SHARDS", 6)
    return DataArguments(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), shuffle_buffer_size=5)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def take(stream, count, batch=4):
    """The images of `count` batches, which hold what the data set holds under their number."""
    found = []
    for _ in range(count):
        images, labels = stream(0, batch)
        assert labels.tolist() == [number % 2 for number in numbers(images)]
        found += numbers(images)
    return found


def test_a_stream_is_all_images_once_an_epoch_in_shuffled_order(args, pixels):
    stream = ImageStream(args, "train", seed=3)
    assert (stream.first.num_levels, stream.first.num_classes) == (256, 2)
    assert tuple(stream.first.images.shape) == (1, 1, 8, 8)
    images, _ = stream(0, NUM_IMAGES)
    assert torch.equal(images[:, 0], torch.from_numpy(pixels)[numbers(images)])
    epochs = [numbers(images), numbers(stream(0, NUM_IMAGES)[0])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_IMAGES))] * 2
    assert epochs[0] != epochs[1]
    assert numbers(ImageStream(args, "train", seed=3)(0, NUM_IMAGES)[0]) == epochs[0]
    assert numbers(ImageStream(args, "train", seed=4)(0, NUM_IMAGES)[0]) != epochs[0]


@pytest.mark.parametrize("num_processes", [2, 3, 4])  # 6 shards: each its own for 2 and 3, all for 4
def test_processes_divide_a_stream_and_each_resumes_exactly(args, num_processes):
    parts = []
    for index in range(num_processes):
        place = {"process_index": index, "num_processes": num_processes}
        stream = ImageStream(args, "train", 3, **place)
        unbroken = take(stream, 20)
        for before in (0, 1, 3, 7, 11):
            stream = ImageStream(args, "train", 3, **place)
            take(stream, before)
            state = json.loads(json.dumps(stream.state_dict()))
            resumed = ImageStream(args, "train", 3, **place)
            resumed.load_state_dict(state)
            assert take(resumed, 20 - before) == unbroken[4 * before :]
        stream, part = ImageStream(args, "train", 3, **place), []
        while stream.epoch == 0:
            part += numbers(stream(0, 1)[0])
        parts.append(set(part[:-1]))  # the last one is of the next epoch
    assert set.union(*parts) == set(range(NUM_IMAGES))
    assert sum(map(len, parts)) == NUM_IMAGES  # disjoint
    with pytest.raises(DataError, match=f"among {num_processes} processes"):
        ImageStream(args, "train", 3).load_state_dict(state)


def test_a_stream_of_files_and_what_is_held_for_evaluation(args, pixels, tmp_path):
    pictures = tmp_path / "pictures" / "train"
    pictures.mkdir(parents=True)
    for number, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(pictures / f"{number:02d}.png")
    files = replace(args, dataset_name=None, train_data_dir=str(tmp_path / "pictures"))
    stream = ImageStream(files, "train", seed=0)
    assert sorted(numbers(stream(0, NUM_IMAGES)[0])) == list(range(NUM_IMAGES))
    held = first_images(args, "test", None)
    assert sorted(numbers(held.images)) == list(range(9))
    assert len(first_images(args, "test", 4)) == 4
    assert Counter(numbers(first_images(args, "test", 4).images)) == Counter(
        numbers(first_images(args, "test", 4).images)
    )


def test_an_image_that_cannot_be_decoded_is_named(args, pixels, tmp_path):
    files = [png(image) for image in pixels]
    files[23]["bytes"] = files[23]["bytes"][:60]
    broken = replace(args, dataset_name=str(save(tmp_path / "broken", files)), eval_split="test")
    with pytest.raises(DataError, match=r"image 23 of the split cannot be decoded: .*leave it out"):
        load_split(broken, "train", seed=0)
    with pytest.raises(
        DataError, match=r"image 23 of the split cannot"
    ):  # the number in the data set, not in the subset
        load_split(replace(broken, max_train_samples=36), "train", seed=0)
    stream = ImageStream(broken, "train", seed=0)  # 37 images in 6 shards: 7, 6, 6, 6, ...
    with pytest.raises(DataError, match=r"image 4 of shard 3 cannot be decoded: .*leave it out"):
        for _ in range(2 * NUM_IMAGES):
            stream(0, 1)


def test_a_mapped_file_holds_what_memory_would(args, tmp_path, monkeypatch):
    held = load_split(replace(args, eval_split="test"), "train", seed=0)
    on_disk = replace(args, eval_split="test", decoded_images="disk")
    mapped = load_split(on_disk, "train", seed=0)
    assert torch.equal(mapped.images, held.images)
    assert (mapped.highest, mapped.fingerprint()) == (held.highest, held.fingerprint())
    (path,) = (tmp_path / "cache" / "decoded").glob("*.npy")
    assert mapped.images.untyped_storage().nbytes() >= 8 * 8 * NUM_IMAGES
    assert not list((tmp_path / "cache" / "decoded").glob(".*"))
    written = path.stat().st_mtime_ns

    monkeypatch.setattr("data.reading.same_kind", None)  # a second run decodes nothing but the first image
    assert torch.equal(load_split(on_disk, "train", seed=0).images, held.images)
    monkeypatch.undo()
    assert path.stat().st_mtime_ns == written
    load_split(replace(on_disk, resolution=4), "train", seed=0)  # other pixels, another file
    assert len(list((tmp_path / "cache" / "decoded").glob("*.npy"))) == 2


def test_a_killed_decoding_leaves_nothing_and_too_small_a_disk_is_told(tmp_path, monkeypatch):
    def killed(images):
        images[0] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_images(tmp_path, "key", (3, 1, 2, 2), torch.uint8, killed)
    assert list(tmp_path.iterdir()) == []
    images, facts = mapped_images(
        tmp_path, "key", (3, 1, 2, 2), torch.int32, lambda array: array.fill(900) or {"highest": 900}
    )
    assert (images.dtype, facts, int(images.min())) == (torch.int32, {"highest": 900}, 900)
    monkeypatch.setattr("data.storage.shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(DataError, match="the decoded images need"):
        mapped_images(tmp_path, "other", (3, 1, 2, 2), torch.uint8, killed)


def test_the_file_is_for_what_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr("data.storage.psutil.virtual_memory", lambda: type("memory", (), {"total": 1000}))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [keeps_on_disk("auto", n, 0.5) for n in (500, 501)] == [False, True]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [keeps_on_disk("auto", n, 0.5) for n in (62, 63)] == [False, True]
    assert [keeps_on_disk(storage, 10**9, 0.5) for storage in ("memory", "disk")] == [False, True]


def test_batches_gathered_ahead_are_the_batches(args):
    images = load_split(replace(args, eval_split="test"), "train", seed=0)
    plain = Batches(images, DataOrder(NUM_IMAGES, 0), torch.device("cpu"))
    ahead = Batches(images, DataOrder(NUM_IMAGES, 0), torch.device("cpu"))
    assert plain.thread is None
    ahead.thread = ThreadPoolExecutor(1)  # as on a GPU
    gathered, calls = ahead.gather, []
    ahead.gather = lambda *place: calls.append(place) or gathered(*place)
    places = [*range(0, 40, 4), 100, 104, 8, 12, 16]
    for place in places:
        for got, want in zip(ahead(place, 4), plain(place, 4), strict=True):
            assert torch.equal(got, want)
    ahead.thread.shutdown()
    assert len(calls) < len(places) + 6  # few were in vain


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--streaming"], "a data set"), (["--streaming", "--dataset_name=x"], "--max_train_steps, and --eval_split")],
)
def test_what_streaming_needs_is_said(given, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--max_train_steps=3", "--eval_split=test", *given] if said == "a data set" else given)
    assert said in capsys.readouterr().err


def test_a_streamed_run_is_resumed_exactly(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.NUM_LOCAL_SHARDS", 6)
    recipe = {
        "hidden_channels": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "train_batch_size": 8,
        "eval_steps": 0,
        "max_train_steps": 9,
        "checkpointing_steps": 4,
        "logging_steps": 1,
        "sample_steps": 0,
        "logger": "none",
        "checkpoints_total_limit": 0,
        "dataset_name": str(folder),
        "eval_split": "test",
        "streaming": True,
        "shuffle_buffer_size": 6,
        "lr_warmup_steps": 0,
        "dropout": 0,
        "learning_rate": "1e-3",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(output_dir, *options):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return train.main([f"--config={tmp_path / 'recipe.yaml'}", f"--output_dir={tmp_path / output_dir}", *options])

    assert run("run") == 0
    want = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert run("run", "--resume_from_checkpoint=checkpoint-4") == 0
    got = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (epochs[0], epochs[-1]) == (0, 1)
