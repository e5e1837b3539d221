import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casallm.data.workers import run_units
from casallm.errors import DataError


def count_to(n):
    yield from range(n)


def fail_at_three(n):
    if n == 3:
        raise DataError("unit 3 is broken: mend it")
    yield n


def fill_the_disk(n):
    yield n
    raise OSError(28, "No space left on device", "x.npy")


def die(n):
    yield n
    os.kill(os.getpid(), signal.SIGKILL)


def linger(path):
    Path(path).write_text(str(os.getpid()))
    yield path
    time.sleep(600)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_that_the_units_report_arrives(workers):
    reports = list(run_units(count_to, [3, 1, 4, 0], workers=workers))

    assert sorted(reports) == [0, 0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_is_raised_here(workers):
    with pytest.raises(DataError, match=r"^unit 3 is broken: mend it$"):
        list(run_units(fail_at_three, [1, 2, 3, 4], workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_system_keeps_its_number(workers):
    with pytest.raises(OSError, match=r"No space left") as caught:
        list(run_units(fill_the_disk, [1, 2], workers=workers))

    assert (caught.value.errno, caught.value.filename) == (28, "x.npy")


def test_the_death_of_a_worker_is_one_sentence():
    with pytest.raises(DataError, match=r"a worker process died \(exit code -9\)"):
        list(run_units(die, [1, 2], workers=2))


def test_workers_die_with_the_process_that_started_them(tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'tests/data')\n"
        "from test_workers import linger\n"
        "from casallm.data.workers import run_units\n"
        "if __name__ == '__main__':\n"
        "    for path in run_units(linger, sys.argv[1:], workers=2): print(path, flush=True)\n"
    )
    (tmp_path / "main.py").write_text(script)
    files = [str(tmp_path / name) for name in "ab"]
    command = [sys.executable, str(tmp_path / "main.py"), *files]
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        for _ in files:
            parent.stdout.readline()
        parent.kill()

    workers = [int(Path(file).read_text()) for file in files]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(is_alive, workers)):
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
