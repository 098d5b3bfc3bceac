"""`python -m tfzero.servers`: the parameter server that TF_CONFIG says this process is."""

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # servers compute on CPUs
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from tfzero.workers.cluster import read_tf_config


def main() -> int:
    """Runs the server. Returns the exit code; bad input exits with 2."""
    try:
        cluster = read_tf_config()
        if cluster is None or not cluster.is_server:
            raise ValueError(
                "A parameter server needs a TF_CONFIG that names it: "
                '{"cluster": {"worker": [...], "ps": ["host:port"]}, "task": {"type": "ps", "index": 0}}.'
            )
        from tfzero.servers.serve import serve  # TensorFlow only now, as the above may fail

        return serve(cluster)
    except (OSError, ValueError) as error:
        print(f"tfzero.servers: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
