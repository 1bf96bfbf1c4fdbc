"""`compress` and `decompress`: images to bytes with a pipeline, and back."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from vdm_diffusers.evaluation.adapters import Predictor, eval_mode
from vdm_diffusers.evaluation.adapters import unpack as unpack_model
from vdm_diffusers.evaluation.chains import adopt, chain_log_snrs, decoder_of, optimal_of, reverse_variance_of
from vdm_diffusers.evaluation.images import check_size, load_images, load_labels
from vdm_diffusers.likelihood import DenoisingModel, DiscreteTerm
from vdm_diffusers.models.calling import device_and_dtype
from vdm_diffusers.models.labels import num_classes

from .chain import Chain, Coder, HierarchyCoder
from .file_format import FileError, Header, pack, unpack
from .stack import CodingError, Stack, constriction

_LARGEST_BATCH = 256
_ROOM = 1.15  # times the bits that an image takes to begin with, about


@dataclass(frozen=True)
class CompressionReport:
    """What a file holds and costs. Bits are for a dimension (pixel and channel) of an image.

    Attributes:
        num_images, num_dims: D of an image.
        net_bits: what the images added to the stack: the rate.
        path_bits: -log2 p(x, z) + log2 q(z | x) of the latents z that were drawn. Its expectation is the bound of the
            chain, and what `net_bits` has beyond it is the coder's own.
        total_bits: the whole file, header and the bits that the stack began with included.
        initial_bits: bits (not for a dimension) that the stack began with.
        header_bytes, file_bytes: sizes.
        num_steps: of the chain. seconds: it took.
        bits_by_step: bits of an image's dimension for x given z_0 (less z_0's own), for each step of the chain from
            the clean end, and for z_K.
    """

    num_images: int
    num_dims: int
    net_bits: float
    path_bits: float
    total_bits: float
    initial_bits: int
    header_bytes: int
    file_bytes: int
    num_steps: int
    seconds: float
    bits_by_step: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.num_images} images in {self.file_bytes} bytes: {self.total_bits:.4f} bits/dim, "
            f"{self.net_bits:.4f} without the "
            f"{self.initial_bits} bits to begin with and {self.header_bytes} bytes of header; {self.num_steps} steps, "
            f"{self.seconds:.1f} s"
        )


def compress(
    model: Any,
    images: Any,
    *,
    scheduler: Any = None,
    num_steps: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    variance_type: str | None = None,
    num_levels: int | Literal["auto"] | None = "auto",
    pixel_encoding: Literal["auto", "bin_center", "endpoint"] = "auto",
    class_labels: Any = None,
    initial: bytes | None = None,
    batch_size: int | None = None,
    progress_bar: bool = True,
) -> bytes:
    """Images, losslessly, in about as many bits as the bound of the model's chain says.

    A file begins with the bits that the first image's latents are drawn with, some 13 for a dimension, once: images in
    one file cost less than one by one. They are made by a seeded generator, or given: then they carry something, and
    come back.

    Args:
        model, images, scheduler, num_levels, pixel_encoding, class_labels: as in [`evaluate_likelihood`].
        num_steps, grid, variance_type: the chain, as in [`evaluate_likelihood`] with `method="discrete"`: its bound is
            the size. More steps give a smaller file and take longer.
        initial: bytes that the stack begins with in place of made-up ones, some 2 D or more (D the dimensions of an
            image). [`decompress_with_initial`] gives them back.
        batch_size: most images at a time. They are fewer at the start of a file, where there are few bits to draw
            with.

    Returns:
        The bytes of a file. [`decompress`] needs the same model, on a machine where its network gives the same
        numbers: a file made on another kind of machine is refused before anything is decoded.

    Raises:
        ValueError: as [`evaluate_likelihood`]; continuous data; too short an `initial`.
        ImportError: `constriction` is not installed.
    Source: Kingma et al. 2021, "Variational Diffusion Models", section 7.3; Townsend et al. 2019, "Practical Lossless
        Compression with Latent Variables using Bits Back Coding"; Kingma et al. 2019, "Bit-Swap" (the order).
    """
    options: dict[str, Any] = {"scheduler": scheduler, "num_steps": num_steps, "grid": grid, "num_levels": num_levels}
    options |= {"variance_type": variance_type, "pixel_encoding": pixel_encoding, "class_labels": class_labels}
    options |= {"initial": initial, "batch_size": batch_size, "progress_bar": progress_bar}
    return compress_with_report(model, images, **options)[0]


def compress_with_report(
    model: Any,
    images: Any,
    *,
    scheduler: Any = None,
    num_steps: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    variance_type: str | None = None,
    num_levels: int | Literal["auto"] | None = "auto",
    pixel_encoding: Literal["auto", "bin_center", "endpoint"] = "auto",
    class_labels: Any = None,
    initial: bytes | None = None,
    batch_size: int | None = None,
    progress_bar: bool = True,
) -> tuple[bytes, CompressionReport]:
    """[`compress`], and what it cost."""
    constriction()
    begun = time.perf_counter()
    own_grid = grid.tolist() if isinstance(grid, Tensor) else grid
    if own_grid is not None and not isinstance(own_grid, str):
        own_grid = [float(value) for value in own_grid]
    wanted: dict[str, Any] = {"num_levels": num_levels, "pixel_encoding": pixel_encoding, "num_steps": num_steps}
    wanted |= {"grid": own_grid, "variance_type": variance_type}
    if _is_autoencoder(model):
        odd = [name for name, value in {**wanted, "scheduler": scheduler}.items() if value not in (None, "auto")]
        if odd or class_labels is not None:
            raise ValueError(
                f"`{(odd or ['class_labels'])[0]}` means nothing to a {type(model).__name__}: leave it out."
            )
        levels, labels = load_images(images, None, model.config.num_levels)
        prepared = _prepare_autoencoder(model)
    else:
        network, stock, count_levels, encoding = unpack_model(model, scheduler, num_levels, pixel_encoding)
        levels, labels = load_images(images, class_labels, count_levels)
        check_size(network, levels)
        if class_labels is None and num_classes(network) is None:
            labels = None
        labels = load_labels(network, labels, len(levels))
        prepared = _prepare_diffusion(
            network, adopt(stock), count_levels, encoding, num_steps, own_grid, variance_type, labels, len(levels)
        )
        prepared.coder.model.check(levels)
    chain = prepared.coder
    if not 0 <= int(levels.min()) <= int(levels.max()) < prepared.num_levels:
        raise ValueError(f"`images` must hold levels in 0..{prepared.num_levels - 1}.")
    array = levels.long().numpy()
    shape = cast("tuple[int, int, int]", tuple(array.shape[1:]))
    num_dims = math.prod(shape)

    most = batch_size or max(1, min(_LARGEST_BATCH, (1 << 18) // num_dims))
    per_image = _ROOM * chain.bits_to_begin() * num_dims + 256
    with eval_mode(prepared.network), torch.no_grad():
        for attempt in range(4):  # should the bits run out after all, begin with more
            words, seed = _first_words(initial, math.ceil(per_image * 1.5**attempt / 32) + 2, array)
            stack = Stack(words)
            begin = stack.num_bits
            batches: list[int] = []
            by_step, path = np.zeros(chain.num_steps + 2), 0.0
            try:
                with tqdm(total=len(array), disable=not progress_bar, unit="image") as bar:
                    while (done := sum(batches)) < len(array):
                        room = int(stack.num_bits / (per_image * 1.5**attempt))
                        count = max(1, min(most, len(array) - done, room))
                        index = torch.arange(done, done + count)
                        trace: list[int] = []
                        path += chain.push_images(stack, array[done : done + count], index, trace)
                        by_step += np.diff(trace)
                        batches.append(count)
                        bar.update(count)
            except CodingError as error:
                if initial is not None or "bits" not in str(error):
                    raise
                continue
            break
        else:
            raise CodingError(
                "the latents need more bits to begin with than could be foreseen: pass a larger `initial`."
            )
        probe = _probe(chain, shape)
    header = Header(
        shape=shape,
        num_levels=prepared.num_levels,
        pixel_encoding=prepared.pixel_encoding,
        model=prepared.digest(),
        chain=chain.fingerprint(),
        probe=probe,
        images=_images_digest(array),
        num_steps=prepared.num_steps,
        grid=prepared.grid,
        variance_type=prepared.variance_type,
        batches=tuple(batches),
        threads=torch.get_num_threads(),
        seed_words=len(words),
        seed=seed,
        labels=None if labels is None else tuple(labels.tolist()),
    )
    final = stack.words()
    data = pack(header, final)
    dims, header_bytes = num_dims * len(array), len(data) - 4 * len(final)
    report = CompressionReport(
        num_images=len(array),
        num_dims=num_dims,
        net_bits=(stack.num_bits - begin) / dims,
        path_bits=path / dims,
        total_bits=8 * len(data) / dims,
        initial_bits=begin,
        header_bytes=header_bytes,
        file_bytes=len(data),
        num_steps=chain.num_steps,
        seconds=time.perf_counter() - begun,
        bits_by_step=tuple((by_step / dims).tolist()),
    )
    return data, report


def decompress(model: Any, data: bytes, *, scheduler: Any = None, progress_bar: bool = True) -> Tensor:
    """The images of a file, (N, C, H, W) integers: those that were compressed, or an error.

    Args:
        model, scheduler: what the file was made with. data: the bytes of the file.
    Raises:
        FileError (a ValueError): the file is damaged, of another version or another model, or was made where the
            network gives other numbers.
    """
    return decompress_with_initial(model, data, scheduler=scheduler, progress_bar=progress_bar)[0]


def decompress_with_initial(
    model: Any, data: bytes, *, scheduler: Any = None, progress_bar: bool = True
) -> tuple[Tensor, bytes | None]:
    """[`decompress`], and the bytes that were given to [`compress`] as `initial`, or None."""
    constriction()
    header, words = unpack(data)
    labels = None if header.labels is None else torch.tensor(header.labels)
    count = sum(header.batches)
    if _is_autoencoder(model):
        prepared = _prepare_autoencoder(model)
    else:
        network, stock, num_levels, encoding = unpack_model(
            model, scheduler, header.num_levels, cast(Any, header.pixel_encoding)
        )
        prepared = _prepare_diffusion(
            network,
            adopt(stock),
            num_levels,
            encoding,
            header.num_steps,
            header.grid,
            header.variance_type,
            labels,
            count,
        )
    if header.model != prepared.digest():
        raise FileError("the file was made with another model: its weights or its configuration are not these.")
    chain = prepared.coder
    if chain.fingerprint() != header.chain:
        raise FileError(
            "the file was made with another chain than this package makes of its header: use the package that wrote "
            "it."
        )
    with eval_mode(prepared.network), torch.no_grad(), _threads(header.threads):
        if _probe(chain, header.shape) != header.probe:
            raise FileError(
                "the network gives other numbers here than where the file was made (another kind of processor, "
                "device, dtype or version "
                "of torch): its images cannot be decoded on this machine."
            )
        stack, parts = Stack(words, continued=True), []
        with tqdm(total=count, disable=not progress_bar, unit="image") as bar:
            done = count
            for size in reversed(header.batches):
                index = torch.arange(done - size, done)
                try:
                    parts.append(chain.pop_images(stack, (size, *header.shape), index))
                except CodingError as error:
                    raise FileError(f"the file cannot be decoded: {error}") from error
                done -= size
                bar.update(size)
    images = np.concatenate(parts[::-1])
    try:
        left = stack.first_words()
    except CodingError as error:
        raise FileError(f"what was decoded is not what was encoded: {error}") from error
    given = None if header.seed is not None else left.astype("<u4").tobytes()
    right = header.seed is None or np.array_equal(left, _made_words(header.seed_words, header.seed))
    if _images_digest(images) != header.images or not right or len(left) != header.seed_words:
        raise FileError("what was decoded is not what was encoded: nothing is returned.")
    if given is not None:
        length = int.from_bytes(given[-4:], "little")
        given = given[:-4][:length]
    return torch.from_numpy(images), given


# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A model as a coder, and what of it stands in the header."""

    coder: Any
    network: Any
    configs: tuple[Any, ...]
    num_levels: int
    pixel_encoding: str
    num_steps: int | None
    grid: Any
    variance_type: str

    def digest(self) -> str:
        """Of weights and configs."""
        digest = hashlib.blake2b(digest_size=8)
        if isinstance(self.network, nn.Module):
            for name, value in sorted(self.network.state_dict().items()):
                digest.update(f"{name} {value.dtype}".encode())
                if value.numel():
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for config in self.configs:
            kept = {key: value for key, value in dict(config).items() if not str(key).startswith("_")}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _is_autoencoder(model: Any) -> bool:
    # by name: a class from a checkpoint's own code is another one
    return type(model).__name__ in ("VariationalAutoencoder", "HierarchicalVAE")


def _prepare_autoencoder(model: Any) -> _Prepared:
    config = model.config
    coder = HierarchyCoder(model)
    return _Prepared(coder, model, (config,), config.num_levels, config.pixel_encoding, None, None, "")


def _prepare_diffusion(
    network: Any,
    scheduler: Any,
    num_levels: int | None,
    pixel_encoding: Any,
    num_steps: int | None,
    grid: Any,
    variance_type: str | None,
    labels: Tensor | None,
    num_images: int,
) -> _Prepared:
    variance = variance_type or scheduler.config.get("variance_type") or "fixed_small"
    device, _ = device_and_dtype(network)
    kind = reverse_variance_of(variance, True, num_steps, scheduler)
    log_snrs = (
        torch.tensor(grid, dtype=torch.float64)
        if grid is not None and not isinstance(grid, str)
        else chain_log_snrs(scheduler, num_steps, cast(Any, grid), kind)
    )
    optimal = optimal_of(scheduler) if kind == "optimal" else None
    learned = cast(Any, kind) if kind in ("learned", "learned_range") else None
    denoiser = DenoisingModel(
        predict=_OnHost(Predictor(network, scheduler, device, labels, {}, num_images), device),
        prediction_type=scheduler.timeline.on_vp(torch.zeros(1).double(), scheduler.config.prediction_type)[0],
        num_levels=num_levels,
        pixel_encoding=pixel_encoding,
        learned_variance=learned,
    )
    coder = Chain(denoiser, DiscreteTerm(log_snrs, kind, optimal), decoder_of(scheduler, kind, num_levels))
    configs = (getattr(network, "config", {}), scheduler.config)
    return _Prepared(coder, network, configs, cast(int, num_levels), pixel_encoding, num_steps, grid, variance)


class _OnHost:
    """A network that is given tensors of the CPU, and gives some back."""

    def __init__(self, predict: Predictor, device: torch.device):
        self.predict, self.device = predict, device

    def __call__(self, z: Tensor, log_snr: Tensor, index: Tensor) -> Tensor:
        return self.predict(z.to(self.device), log_snr, index).to("cpu", torch.float32)


def _made_words(number: int, seed: int) -> NDArray[np.uint32]:
    words = np.random.Generator(np.random.PCG64(seed)).integers(0, 1 << 32, number, dtype=np.uint32)
    words[-1] |= np.uint32(1 << 31)  # a stack's last word is never 0
    return words


def _first_words(
    initial: bytes | None, number: int, images: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], int | None]:
    """The words that a stack begins with, and the seed of made-up ones."""
    if initial is None:
        seed = int(_images_digest(images)[:8], 16)
        return _made_words(number, seed), seed
    padded = initial + b"\0" * (-len(initial) % 4) + len(initial).to_bytes(4, "little")
    words = np.frombuffer(padded, dtype="<u4").astype(np.uint32)
    if len(words) < number or words[-1] == 0:
        raise ValueError(f"`initial` must hold at least {4 * number} bytes, got {len(initial)}.")
    return words, None


def _images_digest(images: NDArray[np.int64]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(images, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def _probe(coder: Coder, shape: tuple[int, int, int]) -> str:
    """A digest of what the network answers to fixed latents at three places of the chain, as the coder rounds it."""
    digest, one, index = hashlib.blake2b(digest_size=8), (1, *shape), torch.zeros(1, dtype=torch.long)
    random = np.random.Generator(np.random.PCG64(0))
    for k in sorted({0, 1, (coder.num_steps + 1) // 2, coder.num_steps}):
        latents = random.integers(-1000, 1000, coder.num_latents(one)) * 1e-3
        if k > coder.num_steps:
            continue
        bins = np.rint(latents / coder.widths[k]).astype(np.int64)
        answer = coder.reverse(k, bins, one, index) if k else coder.levels(bins, one, index)[:2]
        for value in answer:
            digest.update(np.asarray(value, dtype=np.float32).tobytes())
    return digest.hexdigest()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(number, 1024)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
