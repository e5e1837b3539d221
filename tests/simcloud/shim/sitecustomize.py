"""What SkyPilot must not do in tests: contact public addresses, and (where asked) bring up nodes.

On PYTHONPATH of the API server and of everything it starts. Before a managed job is recovered,
its controller asks two public addresses whether the network is up, and waits for ever when they
do not answer: here it asks the simulated cloud instead. With SIMCLOUD_SKIP_BRINGUP set, machines
count as ready as soon as EC2 says that they run: nothing is sent to them.
"""

import importlib.abc
import importlib.machinery
import os
import sys


def _patch_network_check(module):
    module._TEST_IP_LIST = [os.environ["AWS_ENDPOINT_URL"]]


PATCHES = {"sky.backends.backend_utils": _patch_network_check}


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
