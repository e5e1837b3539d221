import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from casallm.train.metrics import Line, evaluation_line
from casallm.train.progress import Outlook, Progress, fields, plain_line, validation_note

LINE: Line = {
    "step": 400,
    "tokens": 409_600,
    "loss": 3.21449,
    "lr": 3e-4,
    "grad_norm": 0.9123,
    "tokens_per_second": 52_310.4,
    "mfu": 0.4123,
    "elapsed_seconds": 100.0,
    "usd": 1.2,
    "attempt": 1,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log_file() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plain_line_reads():
    line = plain_line(LINE, Outlook(400, 2000, 750.0, usd_per_hour=24.0))

    assert line == (
        "step=400/2000 done=20.0% loss=3.2145 lr=3.00e-04 grad_norm=0.912"
        " tokens_per_second=52310 mfu=41.2% usd=1.20 usd_to_finish=5.00 eta=12m30s"
    )


def test_without_a_price_no_dollars_are_shown():
    names = [name for name, _ in fields(LINE, Outlook(400, 2000, 750.0, usd_per_hour=None))]

    assert names == [
        "step", "done", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "eta",
    ]  # fmt: skip


def test_what_is_not_known_yet_is_a_dash():
    line = plain_line({}, Outlook(0, 2000, None, usd_per_hour=1.0))

    assert line == (
        "step=0/2000 done=0.0% loss=- lr=- grad_norm=- tokens_per_second=- mfu=-"
        " usd=- usd_to_finish=- eta=-"
    )


def test_a_log_file_gets_one_unwrapped_line_for_each_line_of_metrics(clock):
    console = log_file()
    progress = Progress(2000, console=console, clock=clock)

    progress.log(LINE)
    progress.close()

    assert written(console) == (
        "step=400/2000 done=20.0% loss=3.2145 lr=3.00e-04 grad_norm=0.912"
        " tokens_per_second=52310 mfu=41.2% eta=31s\n"
    )


def test_a_log_file_hears_of_long_steps_every_half_minute(clock):
    console = log_file()
    progress = Progress(10, console=console, clock=clock)

    for second in range(0, 91, 10):
        clock.now = second
        progress.advance(second // 30)

    assert [row.split()[0] for row in written(console).splitlines()] == [
        "step=1/10",
        "step=2/10",
        "step=3/10",
    ]


def test_a_heartbeat_does_not_repeat_an_old_loss(clock):
    console = log_file()
    progress = Progress(2000, console=console, clock=clock)

    progress.log(LINE)
    clock.now = 31.0
    progress.advance(405)

    assert "step=405/2000 done=20.2% loss=- lr=-" in written(console).splitlines()[1]


def test_the_time_to_finish_includes_the_pauses_between_lines(clock):
    console = log_file()
    progress = Progress(100, console=console, clock=clock)

    progress.log({"step": 10, "tokens": 1000, "loss": 2.0, "tokens_per_second": 100.0})
    clock.now = 30.0  # ten steps of one second each, and twenty seconds of validation
    progress.log({"step": 20, "tokens": 2000, "loss": 2.0, "tokens_per_second": 100.0})

    etas = [row.split("eta=")[1] for row in written(console).splitlines()]
    assert etas == ["1m30s", "4m00s"]


def test_a_resumed_run_measures_its_own_pace(clock):
    console = log_file()
    progress = Progress(1000, console=console, clock=clock)

    progress.log({"step": 910, "tokens": 9100, "loss": 2.0, "tokens_per_second": 10.0})
    clock.now = 20.0
    progress.log({"step": 920, "tokens": 9200, "loss": 2.0, "tokens_per_second": 10.0})

    assert written(console).splitlines()[-1].endswith("eta=2m40s")


def test_a_run_that_ends_early_counts_to_its_new_end(clock):
    console = log_file()
    progress = Progress(2000, console=console, clock=clock)

    progress.total_steps = 500
    progress.log(LINE)

    assert written(console).startswith("step=400/500 done=80.0% ")


def test_validation_is_told_in_a_sentence():
    note = validation_note(evaluation_line(400, 1_600_000, val_loss=3.2, val_bpb=1.05))

    assert note == "validation at step 400 (1.6M tokens): loss 3.2000, 1.0500 bits per byte"


def test_validation_without_bytes_leaves_the_bits_out():
    note = validation_note({"step": 400, "val_loss": None})

    assert note == "validation at step 400: loss -"


def test_a_note_is_printed_as_it_stands_brackets_and_all(clock):
    console = log_file()
    progress = Progress(10, console=console, clock=clock)

    progress.note("checkpoint [bold]step 400[/bold] saved in 0.3 s to s3://bucket/a-long-name")

    assert written(console) == (
        "checkpoint [bold]step 400[/bold] saved in 0.3 s to s3://bucket/a-long-name\n"
    )


def test_a_terminal_shows_the_fields_and_keeps_notes_above_them(clock):
    console = terminal()
    progress = Progress(2000, usd_per_hour=24.0, console=console, clock=clock)

    progress.log(LINE)
    progress.note("checkpoint step 400 saved in 0.3 s")
    progress.close()

    lines = [row.rstrip() for row in screen(written(console))]
    assert lines == [
        "checkpoint step 400 saved in 0.3 s",
        "step 400/2000 ━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━ 20.0% eta 31s",
        "loss 3.2145  lr 3.00e-04  grad norm 0.912  52310 tokens/s  mfu 41.2%"
        "  $1.20 so far  $0.21 to finish",
    ]


def test_a_log_file_has_no_control_characters(clock):
    console = log_file()
    progress = Progress(2000, console=console, clock=clock)

    progress.log(LINE)
    progress.note("saved")
    progress.close()

    assert all(char == "\n" or char.isprintable() for char in written(console))


def test_on_a_real_terminal_warnings_appear_above_the_bar():
    script = (
        "import logging, sys; from casallm.train.progress import Progress\n"
        "logging.basicConfig(format='%(message)s', stream=sys.stderr)\n"
        "progress = Progress(10); progress.advance(3)\n"
        "logging.warning('the disk is nearly full')\n"
        "progress.close(); logging.warning('after the bar')\n"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    ran = subprocess.Popen(
        [sys.executable, "-c", script], stderr=child, env={**os.environ, "TERM": "xterm"}
    )
    os.close(child)

    output = b""
    with contextlib.suppress(OSError):  # Linux says EIO when the last writer has gone
        while chunk := os.read(parent, 4096):
            output += chunk
    os.close(parent)

    assert ran.wait() == 0
    rows = [row.rstrip() for row in screen(output.decode().replace("\r\n", "\n"))]
    assert rows[0] == "the disk is nearly full"
    assert rows[1].startswith("step 3/10 ━━━")
    assert rows[-1] == "after the bar"
    assert sum(row.startswith("step ") for row in rows) == 1


def screen(stream: str) -> list[str]:
    """What a terminal shows in the end: rows overwritten as the escape codes say."""
    rows, row, column, index = [""], 0, 0, 0
    while index < len(stream):
        char = stream[index]
        if stream.startswith("\x1b[", index):
            end = next(i for i in range(index + 2, len(stream)) if stream[i].isalpha())
            argument, code = stream[index + 2 : end], stream[end]
            if code == "A":
                row -= int(argument or 1)
            elif code == "K":
                rows[row] = ""
            index = end
        elif char == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif char == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + char + rows[row][column + 1 :]
            column += 1
        index += 1
    return [each for each in rows if each.strip()]
