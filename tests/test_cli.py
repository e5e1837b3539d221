"""The command line: light help, one sentence for a mistake, the right exit code."""

import subprocess
import sys

import pytest

from casallm.cli import main


def say(capsys, monkeypatch, tmp_path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `casallm ARGUMENTS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["casallm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            "pretrain --preset tinny",
            2,
            "there is no preset 'tinny', did you mean tiny? (presets: tiny, 124m, 350m,"
            " 350m-modern, 1.2b)",
        ),
        (
            "pretrain --params 1.2Q",
            2,
            "params '1.2Q' ends in 'Q', which is no multiplier: use K, M, B or T, as in 1.2B",
        ),
        (
            "pretrain train.stepz=4 optim.beta1=2",
            2,
            "settings: optim.beta1 is '2': input should be less than 1; there is no setting"
            " train.stepz, did you mean train.steps?",
        ),
        (
            "pretrain --preset tiny --params 1M",
            2,
            "--preset and --params both choose the size: give one of them",
        ),
        (
            "pretrain --nodes 2 --node-rank 2",
            2,
            "--node-rank is 2, but --nodes 2 are counted from 0",
        ),
        (
            "sample nope",
            1,
            "runs/nope has no config.yaml, so it is no run: check the name with `casallm runs`",
        ),
        (
            "verify",
            1,
            "there are no runs under runs/ here: name one, or make one with `make pretrain`",
        ),
        (
            "data show .",
            1,
            "there is no data set in . (no manifest.json): name one, or run"
            " `casallm prepare --out .` (again, if it was stopped)",
        ),
    ],
)
def test_a_mistake_is_one_sentence(capsys, monkeypatch, tmp_path, arguments, code, sentence):
    ended, out, err = say(capsys, monkeypatch, tmp_path, *arguments.split())

    assert err == f"error: {sentence}\n"
    assert (ended, out) == (code, "")
    assert list(tmp_path.iterdir()) == []


def test_without_runs_the_list_says_so(capsys, monkeypatch, tmp_path):
    assert say(capsys, monkeypatch, tmp_path, "runs") == (0, "there are no runs in runs\n", "")


def test_help_and_version_load_neither_torch_nor_a_cloud():
    code = (
        "import sys; sys.argv = ['casallm', sys.argv[1]]\n"
        "from casallm.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'sky', 's3fs', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )

    for argument in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True)
        assert done.returncode == 0, done.stderr
