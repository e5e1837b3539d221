"""Every error that a person can do something about, and nothing else.

* CasallmError
    * ConfigError        a setting is wrong (exit code 2)
    * DataError          documents, shards or a tokenizer are missing, broken or do not fit
    * CheckpointError    a run or a checkpoint cannot be read, or must not be continued
    * StoreError         files cannot be read or written where the URL points
        * StoreNotFoundError     there is no such object
        * StoreExistsError       a conditional create lost: somebody else was first
        * StoreDamagedError      the object is not what was written: its hash or size is wrong
    * AttemptError       another start leads this run
    * TrainingError      ranks died, hung, or the model stopped learning (loss is not a number)
    * CloudError         a cloud refused, or something of ours is still running there
    * MissingExtraError  an optional dependency is not installed

A message says what is wrong with the value shown, where, and what to do, in one or two
sentences. Only the command line catches these errors.
"""


class CasallmError(Exception):
    """Something a person must fix; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(CasallmError):
    """A setting is unknown, malformed, out of range or at odds with another."""

    exit_code = 2


class DataError(CasallmError):
    """Documents, shards or a tokenizer are missing, broken or do not fit."""


class CheckpointError(CasallmError):
    """A run or a checkpoint cannot be read, or must not be continued."""


class StoreError(CasallmError):
    """Files cannot be read or written where the URL points."""


class StoreNotFoundError(StoreError):
    """There is no object of that name."""


class StoreExistsError(StoreError):
    """A conditional create lost: the object exists."""


class StoreDamagedError(StoreError):
    """The object is not what was written: its hash or its size is wrong."""


class AttemptError(CasallmError):
    """Another start leads this run."""


class TrainingError(CasallmError):
    """Training cannot go on: ranks died or hung, or the loss is not a number."""


class CloudError(CasallmError):
    """A cloud refused, or something of ours is still running there."""


class MissingExtraError(CasallmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: run `pip install 'casallm[{extra}]'`"
            f" (in a checkout: `make setup EXTRAS={extra}`)"
        )
