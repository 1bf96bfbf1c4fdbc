"""Lossless compression with a diffusion model: files whose size is the bound.

    data = compress(pipe, images, num_steps=32)       # bytes, for a file
    images = decompress(pipe, data)                   # the same integers, or an error

Needs `constriction`, the entropy coder (the extra `compression`).
"""

from .file_format import FileError as FileError
from .images import CompressionReport as CompressionReport
from .images import compress as compress
from .images import compress_with_report as compress_with_report
from .images import decompress as decompress
from .images import decompress_with_initial as decompress_with_initial
from .stack import CodingError as CodingError

__all__ = [
    "CodingError",
    "CompressionReport",
    "FileError",
    "compress",
    "compress_with_report",
    "decompress",
    "decompress_with_initial",
]
