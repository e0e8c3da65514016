"""Bytes of a text file, compressed or not, as a stream and as lines.

Owns decompression and the limit on what one record may take in memory. A file that is truncated
or not what its name says is one ValueError that names it; a line over the limit is handed on as
such, and passed over without being held.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self, cast

UTF8_BOM = b"\xef\xbb\xbf"
COMPRESSED_SUFFIXES = (".gz", ".zst")
MAX_RECORD_BYTES = 256 * 2**20

_BUFFER_BYTES = 2**20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# The last three bytes of the frames that parallel compressors put first.
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"


class Line(NamedTuple):
    """One line: its number from 1, its length in the stream, and its bytes with their newline.

    `data` has no byte order mark. It is None when the line is longer than MAX_RECORD_BYTES.
    """

    number: int
    length: int
    data: bytes | None


class ByteStream:
    """A file's bytes in order, decompressed by its suffix. Use as a context manager.

    Raises ValueError naming the file when the compressed data is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._raw = file.open("rb", buffering=0)
        try:
            self._stream = self._open()
        except BaseException:
            self._raw.close()
            raise

    def _open(self) -> BinaryIO:
        if not self.is_compressed:
            return io.BufferedReader(self._raw, _BUFFER_BYTES)
        head = self._raw.read(4)
        self._raw.seek(0)
        if self.file.suffix == ".gz":
            if head[:2] != b"\x1f\x8b":
                raise self._damage("it does not begin as gzip data does")
            return cast(BinaryIO, gzip.GzipFile(fileobj=self._raw, mode="rb"))
        if head != _ZSTD_MAGIC and head[1:] != _ZSTD_SKIPPABLE:
            raise self._damage("it does not begin as Zstandard data does")
        # Imported here: it takes 50 MB in every process that does. python-zstandard's reader
        # would end a truncated file without an error; Arrow's tells.
        import pyarrow as pa

        inflated = pa.CompressedInputStream(pa.PythonFile(self._raw, "r"), "zstd")
        return io.BufferedReader(inflated, _BUFFER_BYTES)

    def read(self, size: int) -> bytes:
        """The next SIZE bytes, fewer at the end."""
        return self._call(self._stream.read, size)

    def readline(self, size: int) -> bytes:
        """The rest of the line with its newline, SIZE bytes at most."""
        return self._call(self._stream.readline, size)

    def skip_to(self, offset: int) -> None:
        """Continue at byte OFFSET (of a file that is not compressed)."""
        if offset:
            self._stream.seek(offset)

    @property
    def is_compressed(self) -> bool:
        """Whether offsets in the stream differ from offsets in the file."""
        return self.file.suffix in COMPRESSED_SUFFIXES

    @property
    def consumed(self) -> int:
        """How many bytes of the file itself have been taken from the disk."""
        return self._raw.tell()

    def _call(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damage(str(error)) from error
        except OSError as error:
            # Arrow reports damaged data as an OSError too, but without an error number.
            if error.errno is not None:
                raise
            raise self._damage(str(error)) from error

    def _damage(self, what: str) -> ValueError:
        return ValueError(
            f"{self.file}: cannot be decompressed: {what}; download or compress the file again, "
            "or correct its name if it is not compressed"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._raw.close()


def iter_lines(
    stream: ByteStream, start: int = 0, stop: int | None = None, first_line: int = 1
) -> Iterator[Line]:
    """The lines that begin in bytes [START, STOP) of STREAM, which stands at START.

    A line ends after a newline byte or at the end. `first_line` is the number of the first.
    """
    position, number = start, first_line
    while stop is None or position < stop:
        data = stream.readline(MAX_RECORD_BYTES + 1)
        if not data:
            return
        length = len(data)
        if length > MAX_RECORD_BYTES:
            while not data.endswith(b"\n"):
                data = stream.readline(_BUFFER_BYTES)
                if not data:
                    break
                length += len(data)
            yield Line(number, length, None)
        else:
            yield Line(number, length, data.removeprefix(UTF8_BOM) if position == 0 else data)
        position += length
        number += 1
