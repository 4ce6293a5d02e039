"""The shards that `dsllama encode` writes, one at a time: aside, with its name when it is whole."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from dsllama.data.manifest import Shard, shard_paths
from dsllama.files import sha256


class ShardWriter:
    """Streams ids into one `.npy` file of at most `capacity` of them, and its checksum along."""

    def __init__(self, folder: Path, number: int, dtype: str, capacity: int, sos_id: int) -> None:
        self.final, self._aside = shard_paths(folder, number)
        self.tokens = self.documents = 0
        self._capacity = capacity
        self._sos_id = sos_id
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = self._aside.open("wb")
        # A full shard is the rule, so its header can be written, and counted into the checksum, before the ids.
        self._header = self._header_for(capacity)
        self._file.write(self._header)
        self._digest = hashlib.sha256(self._header)

    @property
    def full(self) -> bool:
        return self.tokens == self._capacity

    def add(self, ids: np.ndarray) -> int:
        """Append ids, as many as there is room for; returns how many."""
        part: np.ndarray = ids[: self._capacity - self.tokens].astype(self._dtype, copy=False)
        data = part.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(part)
        self.documents += int(np.count_nonzero(part == self._sos_id))
        return len(part)

    def publish(self) -> Shard:
        """Finish the file and give it its name."""
        if not self.full:
            header = self._header_for(self.tokens)
            assert len(header) == len(self._header), "NumPy leaves room for the length in its header"
            self._file.seek(0)
            self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._digest.hexdigest() if self.full else sha256(self._aside)
        self._aside.rename(self.final)
        return Shard(self.final.name, self.tokens, self.documents, digest)

    def discard(self) -> None:
        """Forget an unfinished file; nothing after `publish`."""
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def _header_for(self, tokens: int) -> bytes:
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": (tokens,)})
        return buffer.getvalue()
