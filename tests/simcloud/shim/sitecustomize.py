"""What SkyPilot must not do in tests: contact public addresses, and (where asked) bring up nodes.

On PYTHONPATH of the API server and of everything it starts. Before a managed job is recovered,
its controller asks two public addresses whether the network is up, and waits for ever when they
do not answer: here it asks the simulated cloud instead. Two processes that watch managed jobs do
instead of the dozen that a computer's memory would hold. A client waits a minute for a server that
is busy, not 7.5 seconds, before it takes it for dead and tries to start another in its place. The
server's queue has a port that no connection of this machine can have taken. With
SIMCLOUD_SKIP_BRINGUP set, machines count as ready as soon as EC2 says that they run: nothing is
sent to them. With SIMCLOUD_NO_NODES, rsync need not be installed: nothing is copied anywhere. With
SIMCLOUD_SKIP_DAEMONS the server does not look after clusters by itself.
"""

import importlib.abc
import importlib.machinery
import os
import sys


def _patch_backend(module):
    module._TEST_IP_LIST = [os.environ["AWS_ENDPOINT_URL"]]
    if os.environ.get("SIMCLOUD_NO_NODES"):
        module.check_rsync_installed = lambda: None


def _patch_controllers(module):
    module.MAX_CONTROLLERS = 2


def _patch_patience(module):
    module.RETRY_COUNT_ON_TIMEOUT = 24
    module.WAIT_APISERVER_START_TIMEOUT_SEC = 300


def _patch_queue(module):
    module.get_queue_manager_port = lambda: int(os.environ["SIMCLOUD_QUEUE_PORT"])


def _patch_daemons(module):
    module.INTERNAL_REQUEST_DAEMONS.clear()


def _patch_bringup(module):
    """Instances are reported as machines on which everything has been set up and started."""
    from sky.provision import common

    run_instances = module.run_instances
    ready = dict.fromkeys(_READY, True) | dict.fromkeys(_ABSENT, False)

    def run_instances_only(*arguments, **keywords):
        record = run_instances(*arguments, **keywords)
        record.runtime_metadata = common.ProvisionRuntimeMetadata(**ready)
        return record

    module.run_instances = run_instances_only


_READY = ("runtime_setup_done", "workdir_synced", "file_mounts_synced", "setup_done", "run_started")
_ABSENT = ("has_ray", "has_skylet", "has_job_queue", "ssh_available")

PATCHES = {
    "sky.backends.backend_utils": _patch_backend,
    "sky.utils.controller_utils": _patch_controllers,
    "sky.server.common": _patch_patience,
    "sky.server.requests.queues.mp_queue": _patch_queue,
}
if os.environ.get("SIMCLOUD_SKIP_DAEMONS"):
    PATCHES["sky.server.daemons"] = _patch_daemons
if os.environ.get("SIMCLOUD_SKIP_BRINGUP"):
    PATCHES["sky.provision.aws.instance"] = _patch_bringup


class _Patcher(importlib.abc.MetaPathFinder):
    """Applies a patch as soon as its module has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("AWS_ENDPOINT_URL"):
    sys.meta_path.insert(0, _Patcher())
