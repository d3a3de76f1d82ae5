"""Files, written whole or not at all, and read only after they have been checked.

Whatever is wrong with a file becomes a ValueError that names it. Reading one never runs code.
"""

import errno
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import secrets
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# The largest checkpoint: model.MAX_PARAMETERS times 5 float32 (model, average, guide, state of
# the optimizers). No file is read that would take more memory
MAX_BYTES = 850_000_000


@contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a file that becomes `path`: a temporary one beside it, flushed and renamed once it is
    complete, so that `path` is whole or unchanged. Raises ValueError with the path on failure, and
    FileExistsError if `path` exists already and must not be replaced."""
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            try:
                os.link(partial, path)  # the one way that is both atomic and exclusive
                return
            except OSError:  # taken, or a file system without hard links, which gets the next best
                open(path, "xb").close()
        os.replace(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {cannot_write(error)}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def check_writable(path: Path) -> None:
    """Raise ValueError if no file can be made at `path`: to be called before the work whose result
    it will hold."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # such as /dev/null
            raise FileExistsError(errno.EEXIST, "it is a device or a pipe")
        _try_to_write(_partial(path))
    except OSError as error:
        raise ValueError(f"{path}: {cannot_write(error)}") from None


def _try_to_write(path: Path) -> None:
    open(path, "xb").close()
    path.unlink(missing_ok=True)  # a run that starts meanwhile may have tidied it up


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where missing. Raises ValueError unless files can be
    written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        _try_to_write(_partial(path / "file"))
    except OSError as error:
        raise ValueError(f"{path}: {cannot_write(error)}") from None


def free_path(path: Path) -> Path:
    """`path`, or if it is taken, with as many _ at the end of its stem as it takes."""
    while path.exists():
        path = path.with_stem(f"{path.stem}_")
    return path


def cannot_write(error: OSError) -> str:
    """Why a file cannot be written, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "cannot be written (the disk is full); free some space"
    if error.errno == errno.ENOENT:
        return "cannot be written (no such folder); make it first"
    return f"cannot be written ({error.strerror or first_line(error)}); choose another place"


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process or machine uses; `.*.partial` finds them all."""
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # file systems allow 255 bytes
    return path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def write_tensors(path: Path, contents: dict[str, Any], *, replace: bool = True) -> None:
    """Write tensors and plain values. Raises what atomic_write raises."""
    buffer = io.BytesIO()  # torch.save itself would hide that a disk is full
    torch.save(contents, buffer)
    if buffer.tell() > MAX_BYTES:
        raise ValueError(
            f"{path}: would hold more than {MAX_BYTES / 1e6:.0f} MB; choose a smaller network"
        )
    with atomic_write(path, replace=replace) as file:
        file.write(buffer.getbuffer())


def read_tensors(
    path: Path, kind: str, *, only_look: bool = False, remedy: str = "choose another"
) -> Any:
    """Read what write_tensors wrote; errors name its `kind`, such as "a checkpoint", and the
    `remedy` if it is damaged. Raises ValueError if it is missing, damaged or too large.

    torch.load ignores the checksums that torch.save writes, so they are verified here first. With
    `only_look`, tensors are read from the disk only when they are used and are not verified: quick
    where only the plain values matter.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; choose another")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_sizes(members)
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("its members are compressed")
            for member in members:
                if not (only_look and "/data/" in member.filename):
                    with archive.open(member) as file:
                        while file.read(1 << 20):  # raises BadZipFile if the checksum is wrong
                            pass
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on foreign files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=only_look)
    except PermissionError:
        raise ValueError(f"{path}: cannot be read; change its permissions") from None
    except Exception as error:  # a damaged file can make zipfile and torch raise almost anything
        reason = f"damaged, or not {kind} ({first_line(error)}); {remedy}"
        raise ValueError(f"{path}: {reason}") from None


def write_safetensors(path: Path, contents: dict[str, Any], *, replace: bool = True) -> None:
    """Write plain values, and dictionaries of tensors, in the format of Hugging Face's safetensors:
    {"ema": {"bias": …}} as the tensor ema.bias, a plain value as JSON in the metadata. Raises
    ValueError if that package is not installed, and what atomic_write raises."""
    tensors, notes = {}, {}
    for name, value in contents.items():
        if isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in value.items()}
        else:
            notes[name] = json.dumps(value)
    content = optional("safetensors.torch").save(tensors, notes)
    with atomic_write(path, replace=replace) as file:
        file.write(content)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read what write_safetensors wrote. Raises ValueError if it is damaged or too large, or if the
    package is not installed."""
    library = optional("safetensors")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it holds more than {MAX_BYTES / 1e6:.0f} MB")
        with library.safe_open(path, "pt") as file:
            contents = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                group, _, key = name.partition(".")
                contents.setdefault(group, {})[key] = file.get_tensor(name)
            return contents
    except Exception as error:  # a damaged file can make the library raise kinds of its own
        reason = f"damaged, or not safetensors ({first_line(error)}); choose another"
        raise ValueError(f"{path}: {reason}") from None


def check_sizes(members: list[zipfile.ZipInfo]) -> None:
    """Raise ValueError if an archive's members unpack to more than MAX_BYTES."""
    if sum(member.file_size for member in members) > MAX_BYTES:
        raise ValueError(f"it holds more than {MAX_BYTES / 1e6:.0f} MB")


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A uint8 array in MNIST's idx format, from `name` or `name`.gz in a folder; downloaded if
    neither is there. Raises ValueError naming the file if it does not hold such an array."""
    path = folder / name
    if not path.exists():
        path = folder / f"{name}.gz"
        if not path.exists():
            download(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic, *shape = struct.unpack(f">{dimensions + 1}I", file.read(4 * dimensions + 4))
            size = math.prod(shape)
            if magic != 0x0800 + dimensions:  # 08 means uint8
                raise ValueError(f"no array of {dimensions} dimensions of bytes")
            if not 0 < size <= MAX_BYTES:
                raise ValueError(f"its shape is {shape}")
            array = np.frombuffer(file.read(size + 1), np.uint8)
        if len(array) != size:
            raise ValueError(f"it should hold {size} bytes, not {len(array)}")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        remedy = "delete it, and it is read from its .gz or downloaded again"
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from None
    return torch.from_numpy(array.reshape(shape).copy())


def download(path: Path) -> None:
    """Download one of MNIST's .gz files. Raises ValueError with the reason and the remedy."""
    datasets = from_torchvision("datasets")
    md5, reason = dict(datasets.MNIST.resources)[path.name], "no mirror is listed"
    for mirror in datasets.MNIST.mirrors:
        try:
            with tempfile.TemporaryDirectory() as folder:
                datasets.utils.download_url(mirror + path.name, folder, md5=md5)
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    file.write(Path(folder, path.name).read_bytes())
                return
        except (
            OSError,
            RuntimeError,
            ValueError,
            HTTPException,
        ) as error:  # offline, or another file
            reason = first_line(error)
    remedy = "go online, choose another --data_dir, or restore it: git checkout mnist_data"
    raise ValueError(f"{path}: missing, and cannot be downloaded ({reason}); {remedy}")


def optional(name: str, remedy: str = "pip install -r requirement-extra.txt") -> ModuleType:
    """A module that only some features need. Raises ValueError if it is missing or broken."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # with unmet dependencies it can raise anything
        reason = f"{name} cannot be imported ({first_line(error)})"
        raise ValueError(f"{reason}; {remedy}") from None


def from_torchvision(name: str) -> ModuleType:
    """A module of torchvision, which takes a second to import. Raises ValueError if it is missing
    or was built for another torch."""
    remedy = "install both from one source: pip install --force-reinstall torch torchvision"
    return optional(f"torchvision.{name}", remedy)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """An error's message, shortened to one printable line."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:2000])


def printable(text: str) -> str:
    """Text from elsewhere without the control characters that could take over a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
