"""What SkyPilot must not do in tests: contact public addresses, and (where asked) bring up nodes.

On PYTHONPATH of the API server and of everything it starts. Before a managed job is recovered,
its controller asks two public addresses whether the network is up, and waits for ever when they
do not answer: here it asks the simulated cloud instead. Two processes that watch managed jobs do
instead of the dozen that a computer's memory would hold. With SIMCLOUD_SKIP_BRINGUP set, machines
count as ready as soon as EC2 says that they run: nothing is sent to them.
"""

import importlib.abc
import importlib.machinery
import os
import sys


def _patch_network_check(module):
    module._TEST_IP_LIST = [os.environ["AWS_ENDPOINT_URL"]]


def _patch_controllers(module):
    module.MAX_CONTROLLERS = 2


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
    "sky.backends.backend_utils": _patch_network_check,
    "sky.utils.controller_utils": _patch_controllers,
}
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
