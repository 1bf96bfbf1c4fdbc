"""Compression: what comes back is what went in, the size is the bound, and nothing else ever comes back."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from vdm_diffusers import (
    HierarchicalVAE,
    VariationalAutoencoder,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    estimate_optimal_variance,
    evaluate_likelihood,
)

pytest.importorskip("constriction")
from vdm_diffusers.compression import (
    FileError,
    compress,
    compress_with_report,
    decompress,
    decompress_with_initial,
)
from vdm_diffusers.compression.stack import CodingError, Stack

ROOT = Path(__file__).resolve().parent.parent


def digits(count: int = 297) -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).long()[-count:, None]


@pytest.fixture(scope="module")
def pipe():
    pipe = VDMPipeline.from_pretrained(ROOT / "model_cards" / "digits-elbo")
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, stochasticity=1.0)
    return pipe


@pytest.fixture(scope="module")
def optimal(pipe):
    images = digits(1500)[:600]
    table = estimate_optimal_variance(
        pipe, images, num_samples=32, progress_bar=False, generator=torch.Generator().manual_seed(0)
    )
    scheduler = VDMScheduler.from_config(pipe.scheduler.config, variance_type="optimal", optimal_variance=table)
    return VDMPipeline(pipe.unet, scheduler, num_levels=17)


def network(size=(4, 4), channels=1, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": ()}
    unet = VDMUNet2DModel(sample_size=size, in_channels=channels, dropout=0.0, **sizes, **options)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    return unet


def small(num_levels=256, **options) -> VDMPipeline:
    return VDMPipeline(network(**options), VDMScheduler(beta_schedule="log_snr_linear"), num_levels=num_levels)


# --- the stack -------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_popped_and_the_beginning_comes_back():
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, 3000, dtype=np.uint32)
    stack, mean = Stack(words), 100 * random.normal(size=2000)
    drawn = stack.pop_gaussian(mean, 11.3, 6.5, escapes=False)
    assert abs((drawn - mean).std() - 11.3) < 0.6 and abs((drawn - mean).mean()) < 0.9
    far = np.rint(mean).astype(np.int64) + random.integers(-500, 500, 2000)
    stack.push_gaussian(far, mean, 11.3, 6.5)
    levels, first = random.integers(0, 256, 2000), random.integers(0, 250, 2000)
    probabilities = np.full((2000, 9), 0.125)
    probabilities[:, 8] = 1e-6
    stack.whiten(500)
    stack.push_levels(levels, first, probabilities, 256)
    again = Stack(stack.words(), continued=True)
    assert np.array_equal(again.pop_levels(first, probabilities, 256), levels)
    again.whiten(500)
    assert np.array_equal(again.pop_gaussian(mean, 11.3, 6.5), far)
    again.push_gaussian(drawn, mean, 11.3, 6.5, escapes=False)
    assert np.array_equal(again.first_words(), words)
    with pytest.raises(CodingError, match="outside its window"):
        again.push_gaussian(far, mean, 11.3, 6.5, escapes=False)
    with pytest.raises(CodingError, match="too far out"):
        again.push_gaussian(np.array([1 << 40]), np.zeros(1), 1.0, 20)


# --- round trips -----------------------------------------------------------------------------------------------------

random_images = torch.randint(0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
TRIPS = {
    "random noise": (lambda: small(), random_images),
    "constant": (lambda: small(), torch.full((3, 1, 4, 4), 200)),
    "black and white": (lambda: small(), torch.tensor([0, 255]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)),
    "one image": (lambda: small(), random_images[:1]),
    "1x1": (lambda: small(size=(1, 1), add_attention=False), torch.arange(0, 250, 50).reshape(5, 1, 1, 1)),
    "3 channels": (lambda: small(size=(3, 5), channels=3), torch.arange(5 * 45).reshape(5, 3, 3, 5) % 256),
    "2 levels": (lambda: small(num_levels=2), random_images % 2),
    "65536 levels": (lambda: small(num_levels=65536), random_images * 257),
    "endpoints": (
        lambda: VDMPipeline(network(), VDMScheduler(beta_schedule="log_snr_cosine"), pixel_encoding="endpoint"),
        random_images,
    ),
}


@pytest.mark.parametrize("name", TRIPS)
def test_what_comes_back_is_what_went_in(name):
    make, images = TRIPS[name]
    data = compress(make(), images, num_steps=6, progress_bar=False)
    back = decompress(make(), data, progress_bar=False)
    assert back.dtype == torch.int64 and torch.equal(back, images)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("schedule", ["linear", "log_snr_linear"])
def test_every_reverse_variance(variance_type, schedule):
    learned = variance_type.startswith("learned")
    unet = network(out_channels=2) if learned else network()
    steps = 1000 if variance_type == "learned" else 12
    train = {"num_train_timesteps": 20} if variance_type == "learned" else {}
    scheduler = VDMScheduler(beta_schedule=schedule, variance_type=variance_type, clip_sample=False, **train)
    pipe = VDMPipeline(unet, scheduler)
    data = compress(pipe, random_images, num_steps=min(steps, 20), progress_bar=False)
    assert torch.equal(decompress(pipe, data, progress_bar=False), random_images)


def autoencoder(kind, likelihood="discretized_logistic", num_levels=17):
    torch.manual_seed(0)
    options = {"likelihood": likelihood, "num_levels": num_levels, "norm_num_groups": 4}
    if kind == "VAE":
        return VariationalAutoencoder(8, 1, 2, (8, 8), **options)
    if kind == "hierarchy":
        return HierarchicalVAE(8, 1, 3, 2, (8, 8), **options)
    restricted = {"num_layers": 4, "encoder_log_snrs": [9.0, 4.0, 0.0, -5.0], "block_out_channels": (8,)}
    return HierarchicalVAE(8, 1, num_levels=num_levels, norm_num_groups=4, **restricted)


@pytest.mark.parametrize(
    ("kind", "likelihood", "num_levels"),
    [
        ("VAE", "discretized_logistic", 17),
        ("VAE", "discretized_gaussian", 17),
        ("VAE", "bernoulli", 2),
        ("hierarchy", "discretized_logistic", 17),
        ("restricted hierarchy", "", 17),
    ],
)
def test_autoencoders_and_hierarchies(kind, likelihood, num_levels):
    """Through the same coder; the size is near the bound of the same draws' kind."""
    model = autoencoder(kind, likelihood or "discretized_logistic", num_levels).eval()
    images = digits(40).clamp(max=num_levels - 1)
    data, report = compress_with_report(model, images, progress_bar=False)
    assert torch.equal(decompress(model, data, progress_bar=False), images)
    with torch.no_grad():
        draws = [model.bound(images, generator=torch.Generator().manual_seed(seed)).nats for seed in range(20)]
    bound = float(torch.stack(draws).double().mean()) / (64 * math.log(2))
    if kind != "restricted hierarchy":
        assert report.net_bits == pytest.approx(bound, rel=0.05)
    else:  # untrained, with a variance that makes its own latents impossible: escapes are cheaper
        assert report.net_bits < bound
    with pytest.raises(ValueError, match="means nothing to a"):
        compress(model, images, num_steps=5)


def test_a_stock_pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    pipe, images = DDPMPipeline(unet, DDPMScheduler()), digits(3) * 15
    assert torch.equal(decompress(pipe, compress(pipe, images, num_steps=8, progress_bar=False)), images)


def test_labels_travel_in_the_file():
    pipe = small(num_class_embeds=3)
    data = compress(pipe, random_images, class_labels=[0, 1, 2, 0, 1], num_steps=4, progress_bar=False)
    assert torch.equal(decompress(pipe, data, progress_bar=False), random_images)


def test_bits_to_begin_with_may_carry_a_message(pipe):
    message = bytes(range(256)) * 3
    images = digits(20)
    data = compress(pipe, images, num_steps=10, initial=message, progress_bar=False)
    back, given = decompress_with_initial(pipe, data, progress_bar=False)
    assert torch.equal(back, images) and given == message
    assert decompress_with_initial(pipe, compress(pipe, images, num_steps=4, progress_bar=False))[1] is None
    with pytest.raises(ValueError, match="`initial` must hold at least"):
        compress(pipe, images, num_steps=10, initial=b"short", progress_bar=False)


# --- the size is the bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "grid"), [(10, "time"), (20, "optimal"), pytest.param(50, "time", marks=pytest.mark.slow)]
)
def test_the_size_is_the_bound(steps, grid, optimal):
    """Of the same chain on the same images.

    A file draws one path, whose scatter is the tolerance; see docs/compression.md for more.
    """
    images = digits(150)
    data, report = compress_with_report(optimal, images, num_steps=steps, grid=grid, progress_bar=False)
    assert torch.equal(decompress(optimal, data, progress_bar=False), images)
    bound = evaluate_likelihood(
        optimal, images, method="discrete", num_steps=steps, grid=grid, num_samples=2 * steps, progress_bar=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert report.net_bits == pytest.approx(bound.bits_per_dim, rel=0.02)
    assert report.net_bits == pytest.approx(report.path_bits, rel=0.003)  # the coder's own part
    assert report.file_bytes == len(data) and report.num_steps == steps
    expected = 8 * len(data) / images.numel()
    assert report.total_bits == pytest.approx(expected) and report.total_bits > report.net_bits
    assert "bits/dim" in str(report)


# --- nothing else ever comes back ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(pipe):
    return compress(pipe, digits(6), num_steps=4, progress_bar=False)


def test_damage_is_refused(pipe, file):
    random = np.random.default_rng(0)
    places = [*range(12), *random.integers(12, len(file), 60).tolist()]
    for place in places:
        spoilt = bytearray(file)
        spoilt[place] ^= 1 << int(random.integers(8))
        with pytest.raises(FileError):
            decompress(pipe, bytes(spoilt), progress_bar=False)
    for cut in (0, 3, 8, 20, 200, len(file) - 4, len(file) - 1):
        with pytest.raises(FileError):
            decompress(pipe, file[:cut], progress_bar=False)
    with pytest.raises(FileError):
        decompress(pipe, file + b"\0\0\0\0", progress_bar=False)


def resealed(file: bytes, change) -> bytes:
    """The file with another header, or other bits, and the checksums to match: a forger's."""
    import hashlib
    import struct

    _, length = struct.unpack("<BI", file[4:9])
    header, bits = json.loads(zlib.decompress(file[9 : 9 + length])), bytearray(file[17 + length :])
    change(header, bits)
    packed = zlib.compress(json.dumps(header).encode())
    digest = hashlib.blake2b(packed + bytes(bits), digest_size=8).digest()
    return file[:4] + struct.pack("<BI", 1, len(packed)) + packed + digest + bytes(bits)


FORGED = {
    "other bits": lambda h, b: b.__setitem__(slice(0, 4), b"\1\2\3\4"),
    "another batch layout": lambda h, b: h.update(batches=[sum(h["batches"])]),
    "fewer images": lambda h, b: h.update(batches=h["batches"][:-1]),
    "another shape": lambda h, b: h.update(shape=[1, 4, 16]),
    "another chain": lambda h, b: h.update(num_steps=5),
    "another grid": lambda h, b: h.update(grid="log_snr"),
    "another variance": lambda h, b: h.update(variance_type="fixed_large"),
    "another number of levels": lambda h, b: h.update(num_levels=16),
    "endless steps": lambda h, b: h.update(num_steps=10**9),
    "a shape beyond all memory": lambda h, b: h.update(shape=[1, 10**6, 10**6]),
    "a batch of -1": lambda h, b: h.update(batches=[-1]),
    "text for a number": lambda h, b: h.update(threads="many"),
    "a missing entry": lambda h, b: h.pop("probe"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file_never_gives_an_image(name, pipe, file):
    with pytest.raises(ValueError, match=r"\w"):
        decompress(pipe, resealed(file, FORGED[name]), progress_bar=False)


def test_another_model_version_or_machine_is_named(pipe, file, monkeypatch):
    with pytest.raises(FileError, match="another model"):
        decompress(small(num_levels=17, size=(8, 8)), file, progress_bar=False)
    with pytest.raises(FileError, match="version 2"):
        decompress(pipe, file[:4] + b"\2" + file[5:], progress_bar=False)
    with pytest.raises(FileError, match="VDMC"):
        decompress(pipe, b"PNG" + file, progress_bar=False)
    forward = pipe.unet.forward  # a machine whose sums come out otherwise in the seventh digit

    def other(sample, *args, **kwargs):
        output = forward(sample, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output.sample
        return type(output)((first * (1 + 1e-4),)) if isinstance(output, tuple) else type(output)(first * (1 + 1e-4))

    monkeypatch.setattr(pipe.unet, "forward", other)
    with pytest.raises(FileError, match="gives other numbers here"):
        decompress(pipe, file, progress_bar=False)


def test_continuous_data_and_frequencies_have_no_code(pipe):
    with pytest.raises(ValueError, match="num_levels"):
        compress(pipe.unet, digits(2).float(), scheduler=pipe.scheduler, num_levels=None)
    table = estimate_optimal_variance(pipe, digits(40), per_frequency=True, num_knots=8, progress_bar=False)
    scheduler = VDMScheduler.from_config(pipe.scheduler.config, variance_type="optimal", optimal_variance=table)
    with pytest.raises(ValueError, match="per_frequency"):
        compress(VDMPipeline(pipe.unet, scheduler, num_levels=17), digits(2), num_steps=5)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("compress_example", ROOT / "examples" / "compress.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number, image in enumerate(digits(5)):
        Image.fromarray(image[0].numpy().astype(np.uint8)).save(tmp_path / "in" / f"{number}.png")
    return tmp_path


def test_the_command_goes_there_and_back(command, folder, capsys):
    model = ["--model", str(ROOT / "model_cards" / "digits-elbo")]
    assert command.main([str(folder / "in"), str(folder / "out.vdm"), *model, "--steps", "4"]) == 0
    shown = capsys.readouterr().out
    assert "| PNG |" in shown and "| WebP |" in shown and "bits/dim" in shown
    assert command.main([str(folder / "out.vdm"), str(folder / "back"), *model, "--decompress"]) == 0
    for path in sorted((folder / "in").glob("*.png")):
        back = folder / "back" / f"{int(path.stem):06d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(back)))
    assert command.main([str(folder / "in"), str(folder / "out.vdm"), *model]) == 2  # exists
    assert "--overwrite" in capsys.readouterr().err
    assert command.main([str(folder / "none"), str(folder / "x"), *model]) == 2


def test_killed_in_the_middle_leaves_no_half_file(folder):
    start = [
        sys.executable,
        str(ROOT / "examples" / "compress.py"),
        str(folder / "in"),
        str(folder / "out.vdm"),
        "--steps",
        "4000",
    ]
    process = subprocess.Popen([*start, "--model", str(ROOT / "model_cards" / "digits-elbo")], stderr=subprocess.PIPE)
    time.sleep(0.1)
    seen = b""
    while b"image" not in seen:  # the progress bar: it is under way
        seen += os.read(process.stderr.fileno(), 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out.vdm").exists() and math.isfinite(len(seen))
