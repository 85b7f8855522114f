"""Tensors of a checkpoint by name, mapped from their files, so that reading copies nothing."""

import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from qnext.io.header import TensorEntry
from qnext.io.shards import read_entries

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


class CheckpointReader:
    """An open checkpoint. Creating one checks the index and every header, and reads no tensor."""

    def __init__(self, folder: Path) -> None:
        """Opens a folder of safetensors files.

        Raises:
            ValueError: a file is missing, truncated or lies about its content; the text names it.
        """
        self.folder = folder
        self.entries: Mapping[str, TensorEntry] = read_entries(folder)
        self._maps: dict[Path, torch.Tensor] = {}
        self._files: dict[Path, mmap.mmap] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({entry.file for entry in self.entries.values()})

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which a tensor is stored.

        Raises:
            ValueError: torch has no such dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise ValueError(f"{entry.file}: {name}: dtype {entry.dtype} cannot be read by torch")
        return TORCH_DTYPES[entry.dtype]

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor that aliases the mapped file: read from it, never write to it.

        Its pages belong to the file, and the kernel may drop them at any time.

        Raises:
            KeyError: the checkpoint has no such tensor.
            ValueError: torch has no such dtype, or the file cannot be mapped.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        if entry.num_bytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        content = self._map(entry.file)[entry.start_bytes : entry.end_bytes]
        if entry.start_bytes % dtype.itemsize != 0:
            content = content.clone()
        return content.view(dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process's memory; reading it again brings them back.

        Without this a loaded checkpoint stands twice in what the system counts for the process.
        """
        entry = self.entries[name]
        content = self._files.get(entry.file)
        if content is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = entry.start_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.end_bytes > start:
            content.madvise(mmap.MADV_DONTNEED, start, entry.end_bytes - start)

    def close(self) -> None:
        """Forgets the mappings; tensors already returned keep theirs alive."""
        self._maps.clear()
        self._files.clear()

    def _map(self, path: Path) -> torch.Tensor:
        if path not in self._maps:
            try:
                with open(path, "rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise ValueError(f"{path}: cannot be mapped: {error.strerror or error}") from error
            with warnings.catch_warnings():
                # torch warns that nobody may write to it; nobody does.
                warnings.simplefilter("ignore", UserWarning)
                self._maps[path] = torch.frombuffer(content, dtype=torch.uint8)
            self._files[path] = content
        return self._maps[path]
