"""Two processes that train together: gradients of a planned module reach DistributedDataParallel's buckets bit-equal."""

import os
import subprocess
import sys
from subprocess import PIPE, STDOUT


def test_two_processes_train_bit_exactly_under_ddp(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "tests.support.ddp_worker"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stdout=PIPE, stderr=STDOUT, text=True)
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    assert all(" 0 different" in text for text in said), said
