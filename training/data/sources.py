"""Where images come from: the Hub, folders, parquet files; which columns hold them and their classes."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from arguments import DataArguments

from .images import DataError

NUM_LOCAL_SHARDS = 64  # that a data set on the disk is streamed in: any number of processes up to it has its own
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of several splits, or of one, writes


def is_digits(args: DataArguments) -> bool:
    """Whether the data are the embedded digits."""
    return args.dataset_name is None and args.train_data_dir is None


def source_of(args: DataArguments) -> str:
    """The data set as it was asked for."""
    return args.dataset_name or str(args.train_data_dir)


def open_splits(args: DataArguments, *, streaming: bool = False) -> Any:
    """The data set's splits by name: datasets.DatasetDict, or IterableDatasetDict that is read in passing.

    Raises:
        DataError: there is no such data set, or it cannot be read; the message says which and why.
    """
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    option = "--dataset_name" if args.train_data_dir is None else "--train_data_dir"
    try:
        splits = _open(args, streaming)
    # what `datasets` raises where files are missing, empty, of other kinds, broken, or out of reach
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        pyarrow.ArrowException,
        KeyError,
        TypeError,
    ) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise DataError(f"{option} {source_of(args)} cannot be read: {_one_line(cause or error)}") from error
    if not splits:
        raise DataError(f"{option} {source_of(args)} holds no images.")
    return splits


def _one_line(error: BaseException) -> str:
    """The first sentence or so of what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".") + "."


def _open(args: DataArguments, streaming: bool) -> Any:
    import datasets

    common = {"cache_dir": args.cache_dir, "streaming": streaming}
    source = Path(source_of(args))
    if source.is_dir() and any((source / name).is_file() for name in _SAVED):
        return _saved(source, streaming)
    if args.train_data_dir is not None:
        if not source.is_dir():
            what = "is a file, not a folder of images" if source.exists() else "does not exist"
            raise DataError(f"--train_data_dir {source} {what}.")
        # a folder is a pattern to `datasets`, in which brackets have a meaning
        return datasets.load_dataset("imagefolder", data_dir=glob.escape(str(source)), **common)
    if source.suffix == ".parquet":
        if not source.is_file():
            raise DataError(f"--dataset_name {source} does not exist.")
        return datasets.load_dataset("parquet", data_files={"train": glob.escape(str(source))}, **common)
    if source.is_file():
        raise DataError(
            f"--dataset_name {source} is a {source.suffix or 'file without an ending'}: a .parquet file, a folder or "
            "the name of a "
            "data set on the Hub is read. Unpack an archive, and name the folder with --train_data_dir."
        )
    if _looks_like_a_path(str(args.dataset_name)) and not source.exists():
        raise DataError(f"--dataset_name {source} does not exist.")
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, **common)


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be one of the Hub, which has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _saved(folder: Path, streaming: bool) -> Any:
    """What `save_to_disk` wrote: splits, or one that is called train."""
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    if not streaming:
        return splits
    return {
        name: split.to_iterable_dataset(num_shards=min(NUM_LOCAL_SHARDS, max(1, len(split))))
        for name, split in splits.items()
    }


def find_split(splits: Any, split: str) -> Any:
    """One split of `open_splits`.

    Raises:
        DataError: there is none of this name.
    """
    if split not in splits:
        raise DataError(
            f"the data have no split {split!r}, only {', '.join(map(repr, splits))}: see --train_split, --eval_split."
        )
    return splits[split]


def image_column(dataset: Any, name: str | None) -> str:
    """The column that holds the images: the named one, or the only one whose feature is an image.

    Raises:
        DataError: there is none, or more than one.
    """
    import datasets

    if name is not None:
        if name not in dataset.column_names:
            raise DataError(f"--image_column {name}: the columns are {', '.join(dataset.column_names)}.")
        return name
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    # a parquet file that somebody else wrote has the struct of an image without its name
    found = found or [c for c, f in dataset.features.items() if isinstance(f, dict) and set(f) == {"bytes", "path"}]
    if len(found) != 1:
        several = f"more than one column ({', '.join(found)})" if found else "no column"
        raise DataError(
            f"{several} of the data holds images; name one of {', '.join(dataset.column_names)} with --image_column."
        )
    return found[0]


def label_column(dataset: Any, name: str | None) -> tuple[str | None, tuple[str, ...] | None]:
    """The column of the class labels, and what its classes are called: the named one, or the only ClassLabel; (None,
    None) without.

    A named column of plain integers is one too, without names for its classes.

    Raises:
        DataError: there is no column of this name, or a stream's says nothing of its classes.
    """
    import datasets

    if name is not None:
        if name not in dataset.column_names:
            raise DataError(f"--label_column {name}: the columns are {', '.join(dataset.column_names)}.")
        feature = dataset.features[name]
        is_class = isinstance(feature, datasets.ClassLabel)
        if not is_class and isinstance(dataset, datasets.IterableDataset):
            raise DataError(
                f"--label_column {name} must be a ClassLabel in a data set that is streamed, not {feature}."
            )
        return name, tuple(feature.names) if is_class else None
    found = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return (found[0], tuple(dataset.features[found[0]].names)) if len(found) == 1 else (None, None)


def as_images(dataset: Any, column: str, *, decode: bool) -> Any:
    """The data set with `column` as image files, decoded or not, where that is what it holds."""
    import datasets

    if isinstance(dataset.features[column], (datasets.Image, dict)):
        return dataset.cast_column(column, datasets.Image(decode=decode))
    return dataset
