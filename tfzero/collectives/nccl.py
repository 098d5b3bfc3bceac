"""NCCL, through TensorFlow: between GPUs of one process or of several.

[Note: ways] says what TensorFlow's NCCL can and cannot do; `nccl_failures.py` handles its error messages.
"""

import contextlib
import ctypes

import tensorflow as tf

from tfzero.collectives import nccl_failures, ways
from tfzero.collectives.rings import TensorFlows
from tfzero.collectives.transport import Call, Surroundings, Transport
from tfzero.collectives.ways import Place
from tfzero.host import distributed
from tfzero.plan.settings import Settings

_UNPROVEN = (
    "Unproven by tfzero's own tests, which have been run on CPUs only: GPUs, of one process and of several. "
    "There this command is the proof."
)


def has_whole_gpus() -> bool:
    """Whether this process has GPUs and none is split. NCCL refuses two replicas on one GPU; these use rings."""
    gpus = tf.config.list_physical_devices("GPU")
    return bool(gpus) and all(len(tf.config.get_logical_device_configuration(gpu) or [None]) == 1 for gpu in gpus)


def version() -> str:
    """Version of the NCCL that this process has loaded or would load."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return "not found by the loader"
    number = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(number)) != 0:
        return "does not tell"
    major, rest = divmod(number.value, 10000) if number.value >= 10000 else divmod(number.value, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


class Nccl(TensorFlows):
    """NCCL. All its collectives run in one order, the same on all members. [Note: ordering]"""

    name = hint = "nccl"
    title = "NCCL"
    device_types = ("GPU",)
    rows = ways.NCCL
    lanes = 1
    gathers_small_sums = False
    is_tested_in_every_dtype = True  # there are many versions of NCCL

    @classmethod
    def configure(cls, is_clustered: bool) -> contextlib.AbstractContextManager:
        """Configures the process once, whichever devices its first strategy takes."""
        return distributed.with_nccl(is_clustered and has_whole_gpus())

    @classmethod
    def obstacle(cls, where: Surroundings) -> str:
        """NCCL accepts each GPU only once."""
        return "" if has_whole_gpus() else "replicas share GPUs, which NCCL refuses"

    @classmethod
    def merit(cls, where: Surroundings) -> str:
        """Each replica has a GPU of its own."""
        return "replicas compute on GPUs of their own"

    def check(self, settings: Settings, workers: int) -> None:
        """Between processes, gradients are not encoded. [Note: ways]"""
        if settings.error_feedback and workers > 1:
            raise ValueError(
                "error_feedback=True has no effect between GPUs of several processes: there gradients are not encoded, "
                "as TensorFlow's NCCL adds them on the way, in float32; only parameters travel as "
                f"{settings.compression}. Leave `error_feedback` away."
            )

    def obstacle_of_levels(self, device_type: str) -> str:
        """NCCL handles levels itself."""
        return "NCCL's own reduce-scatter knows which GPUs are near"

    def prepare(self) -> None:
        """Makes NCCL log its warnings."""
        nccl_failures.keep_log()

    def meeting(self, worker: str, timeout_seconds: float) -> contextlib.AbstractContextManager:
        """While active, NCCL connects the GPUs of all workers."""
        return nccl_failures.naming_nccl(True, worker, timeout_seconds)

    def describe(self, is_between: bool) -> str:
        """The dtype in which 16-bit floats are added."""
        narrow = "its own too," if is_between else "an all-to-all and a sum"
        return f"NCCL; reduce-scatter is its own, of 16-bit floats {narrow} in float32"

    @property
    def note(self) -> str:
        """The version of NCCL."""
        return f"NCCL {version()}. {_UNPROVEN}"

    def of_tensorflow(self, primitive: str, place: Place) -> Transport | None:
        """Itself, except for the broadcast and for the all-to-all, which is wrong between processes."""
        return self if primitive in (ways.ALL_REDUCE, ways.ALL_GATHER, ways.REDUCE_SCATTER) else None

    def reduce_scatter(self, rows: tf.Tensor, call: Call) -> tf.Tensor:
        """Sum over members of this rank's row: `[members * n]` to `[n]`."""
        return self._summed_row(rows, call)
