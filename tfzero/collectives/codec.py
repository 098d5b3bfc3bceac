"""Compressed wire formats: bfloat16, or float16 and int8 with one scale for each 256 elements.

The blockwise format is that of ZeRO++ (https://arxiv.org/abs/2306.10209), symmetric and rounded to nearest. Error
feedback, in `training/exchange.py`, is that of 1-bit SGD
(https://www.microsoft.com/en-us/research/publication/1-bit-sgd/).

[Note: exact products] Replicas add decoded differences to what they hold, and must stay equal for ever, even if some
machines fuse the product with the sum and others do not. So a scale keeps few significant bits: its product with any
encoded element is exact in float32, and fusing changes nothing.
"""

from dataclasses import dataclass

import tensorflow as tf

from tfzero.plan.formats import BLOCK_ELEMENTS, FORMATS, WireFormat

# The value to which a block's largest element is scaled, and the dtype of the elements.
_BLOCKWISE = {"int8": (127.0, tf.int8), "fp16": (16384.0, tf.float16)}
# float16 has 11 significant bits and float32 has 24, so this many low bits of a scale must be 0. [Note: exact products]
_CLEARED = (1 << 11) - 1
# A block with a smaller scale travels as zeros: the inverse of that scale would overflow.
_SMALLEST_SCALE = 1e-37


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes rows of floats. XLA compiles each function into one pass over memory."""

    format: WireFormat

    @classmethod
    def of(cls, compression: str | None) -> "Codec | None":
        """The codec of a strategy's `compression`."""
        return None if compression is None else cls(FORMATS[compression])

    def serves(self, shape: tf.TensorShape, dtype: tf.DType) -> bool:
        """Whether such variables travel encoded: those of wider floats, with two or more dimensions."""
        return len(shape) > 1 and dtype.is_floating and dtype.size > self.format.item_bytes

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Encodes `[k, n]` floats as `[k, words]` int32. A block with an element that is not finite decodes to NaN."""
        return tf.function(self.encoded, jit_compile=True, autograph=False)(rows)

    def decode(self, payload: tf.Tensor, elements: int, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """Decodes `[k, words]` int32 to `[k, elements]` floats."""

        def decode(payload: tf.Tensor) -> tf.Tensor:
            return tf.cast(self.decoded(payload, elements), dtype)

        return tf.function(decode, jit_compile=True, autograph=False)(payload)

    def decode_sum(self, payload: tf.Tensor, elements: int) -> tf.Tensor:
        """Decodes all rows and returns their sum in float32: `[k, words]` int32 to `[elements]`."""

        def decode_sum(payload: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(self.decoded(payload, elements), 0)

        return tf.function(decode_sum, jit_compile=True, autograph=False)(payload)

    # These are meant to be compiled together with the code before or after them.

    def encoded(self, rows: tf.Tensor) -> tf.Tensor:
        count, elements = rows.shape
        rows = tf.cast(rows, tf.float32)
        if padding := self.format.padded(elements) - elements:
            rows = tf.pad(rows, [[0, 0], [0, padding]])
        if not self.format.has_scales:
            return _as_words(tf.cast(rows, tf.bfloat16))
        limit, dtype = _BLOCKWISE[self.format.name]
        blocks = tf.reshape(rows, [count, -1, BLOCK_ELEMENTS])
        scales = _rounded_up(tf.reduce_max(tf.abs(blocks), 2) / limit)
        inverse = tf.where(scales < _SMALLEST_SCALE, 0.0, 1.0 / scales)
        scaled = blocks * inverse[..., tf.newaxis]
        items = tf.cast(tf.round(scaled) if dtype.is_integer else scaled, dtype)
        # A maximum may ignore NaN; a sum does not.
        flaws = tf.reduce_sum(blocks * 0.0, 2)
        return tf.concat([_as_words(tf.reshape(items, [count, -1])), tf.bitcast(scales + flaws, tf.int32)], 1)

    def encoded_with(self, rows: tf.Tensor, residual: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Encodes rows plus residual; returns the payload and the new residual (the old one where it is not finite)."""
        wanted = tf.cast(rows, tf.float32) + residual
        payload = self.encoded(wanted)
        lost = wanted - self.decoded(payload, wanted.shape[1])
        return payload, tf.where(tf.math.is_finite(lost), lost, residual)

    def decoded(self, payload: tf.Tensor, elements: int) -> tf.Tensor:
        if not self.format.has_scales:
            return tf.cast(_from_words(payload, tf.bfloat16), tf.float32)[:, :elements]
        words = payload.shape[1] - self.format.padded(elements) // BLOCK_ELEMENTS
        items = _from_words(payload[:, :words], _BLOCKWISE[self.format.name][1])
        scales = tf.bitcast(payload[:, words:], tf.float32)[..., tf.newaxis]
        blocks = tf.reshape(tf.cast(items, tf.float32), [payload.shape[0], -1, BLOCK_ELEMENTS])
        return tf.reshape(blocks * scales, [payload.shape[0], -1])[:, :elements]


def _rounded_up(scales: tf.Tensor) -> tf.Tensor:
    """The next larger floats that have few significant bits. [Note: exact products]"""
    bits = tf.bitcast(scales, tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_and(bits + _CLEARED, ~_CLEARED), tf.float32)


def _as_words(items: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(tf.reshape(items, [items.shape[0], -1, 4 // items.dtype.size]), tf.int32)


def _from_words(words: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.reshape(tf.bitcast(words, dtype), [words.shape[0], -1])
