"""Sizes of encoded floats on the wire: pure arithmetic. `collectives/codec.py` encodes them."""

from dataclasses import dataclass

# Elements that share a scale.
BLOCK_ELEMENTS = 256
_SCALE_BYTES = 4
_WORD_BYTES = 4  # payloads are made of 32-bit words


@dataclass(frozen=True)
class WireFormat:
    """A wire format that encodes floats in fewer bits.

    Args:
        name: as in `ZeroStrategy(compression=...)`.
        item_bytes: bytes of one element.
        has_scales: whether each block of `BLOCK_ELEMENTS` elements has a scale of 4 bytes.
    """

    name: str
    item_bytes: int
    has_scales: bool

    def padded(self, elements: int) -> int:
        """Number of elements after padding to whole blocks, or to whole words if there are no scales."""
        unit = BLOCK_ELEMENTS if self.has_scales else _WORD_BYTES // self.item_bytes
        return -(-elements // unit) * unit

    def words(self, elements: int) -> int:
        """Number of 32-bit words that encode a run of elements."""
        scales = self.padded(elements) // BLOCK_ELEMENTS if self.has_scales else 0
        return self.padded(elements) * self.item_bytes // _WORD_BYTES + scales * _SCALE_BYTES // _WORD_BYTES

    def size_bytes(self, elements: int) -> int:
        """Number of bytes that encode a run of elements."""
        return self.words(elements) * _WORD_BYTES


FORMATS = {
    "bf16": WireFormat("bf16", 2, has_scales=False),
    "fp16": WireFormat("fp16", 2, has_scales=True),
    "int8": WireFormat("int8", 1, has_scales=True),
}
