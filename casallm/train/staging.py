"""The state copied aside, so that training goes on while it is written.

The buffers are made once and used again for every checkpoint: memory that is new to a process
costs more than the copy, and pinned memory (which a GPU can write to on its own) much more.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Staging:
    """Buffers in host memory, one for each tensor."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, contiguous on the CPU; valid until the next call.

        GPU tensors are copied on a stream of their own, which waits for the work queued so far
        and is waited for: on return nothing done to the tensors reaches the copy any more.
        """
        streams = {t.device: _side_stream(t.device) for t in tensors.values() if t.is_cuda}
        copies = {}
        for name, tensor in tensors.items():
            buffer = copies[name] = self._buffer(name, tensor)
            if tensor.is_cuda:
                with torch.cuda.stream(streams[tensor.device]):
                    buffer.copy_(tensor.detach(), non_blocking=True)
            else:
                buffer.copy_(tensor.detach())
        for stream in streams.values():
            stream.synchronize()
        return copies

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch has no annotation
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
