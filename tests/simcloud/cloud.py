"""The simulated cloud: moto as AWS, SkyPilot itself, and (where asked) real little machines.

`SimulatedCloud` is started by fixtures. Everything that it starts carries its folder in its
environment and is ended by that mark; nothing in it contacts an address outside this machine.
Several may run at once: each has its own ports, home, account and nodes' network.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.simcloud import nodes, ownership
from tests.simcloud.catalog import install_catalog

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
TOOLS = ("unshare", "nsenter", "socat", "rsync", "ip", "sudo", "ssh", "sshd", "ssh-keygen")

PATIENCE = float(os.environ.get("SIMCLOUD_PATIENCE", "1"))
"""Every time limit is multiplied by it: more than 1 on a machine that has other work to do."""


def missing_for_skypilot() -> str | None:
    """Why SkyPilot cannot run here against moto, or None."""
    absent = [name for name in ("sky", "aws", "moto_server") if not (BIN / name).exists()]
    return f"{', '.join(absent)} not installed (extras cloud and dev)" if absent else None


def missing_for_nodes() -> str | None:
    """Why no simulated machine can run here, or None."""
    reason = missing_for_skypilot()
    if reason:
        return reason
    if os.geteuid() != 0:
        return "simulated machines need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    probe = subprocess.run(["unshare", *nodes.NAMESPACES, "--fork", "true"], check=False)
    return None if probe.returncode == 0 else "namespaces are not allowed here"


class SimulatedCloud:
    """One AWS account with nothing in it, and a home folder whose SkyPilot uses it."""

    def __init__(
        self, *, has_nodes: bool = False, has_spot: bool = False, is_bare: bool = False
    ) -> None:
        """With machines that can be entered; with managed jobs; with machines that need no setup.

        Managed jobs are watched by SkyPilot's server itself, as its consolidation mode has it;
        without them SkyPilot says, as it does to most, that it has no controller.
        """
        self.folder = ownership.claim()
        self.home = self.folder / "home"
        self.has_nodes, self.has_spot, self.is_bare = has_nodes, has_spot, is_bare
        moto, self.server_port, self._queue_port = _free_ports()
        self.endpoint = f"http://127.0.0.1:{moto}"
        self.image_root = Path(
            os.environ.get("SIMCLOUD_ROOT", Path(tempfile.gettempdir()) / "casallm-simcloud")
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to live in this cloud; AWS keys are made up."""
        kept = ("LANG", "SSL_CERT_FILE", "TIKTOKEN_CACHE_DIR", "CASALLM_SHARED_DATA")
        return {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "HOME": str(self.home),
            "USER": f"tester{self.server_port}",  # SkyPilot's ssh sockets are named after it
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{HERE / 'shim'}:{CHECKOUT}",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self.server_port),
            "SIMCLOUD_QUEUE_PORT": str(self._queue_port),
            "SIMCLOUD_ROOT": str(self.image_root),
            ownership.MARK: str(self.folder),
            **({} if self.has_nodes else {"SIMCLOUD_NO_NODES": "1"}),
            **({"SIMCLOUD_SKIP_BRINGUP": "1"} if self.is_bare else {}),
            **({} if self.has_nodes or self.is_bare else {"SIMCLOUD_SKIP_DAEMONS": "1"}),
        }

    def start(self) -> None:
        """Bring up moto, an account as AWS hands it out, and the nodes' keeper."""
        if self.has_nodes:
            build = [str(HERE / "build_image.sh"), str(self.image_root), str(CHECKOUT)]
            subprocess.run(build, check=True, stdin=subprocess.DEVNULL)
            place = self.image_root / "clouds" / self.folder.name
            place.mkdir(parents=True)
            (self.folder / "nodes").symlink_to(place)
        (self.folder / "tmp").mkdir()
        install_catalog(self.home)
        self._configure()
        moto = {
            "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
            "MOTO_AMIS_PATH": str(HERE / "amis.json"),
        }
        port = self.endpoint.rpartition(":")[2]
        self._spawn("account", ["-H", "127.0.0.1", "-p", port], moto)
        wait_until(self._answers, seconds=60, what="moto to answer")
        _furnish(self)
        if self.has_nodes:
            self._spawn("nodes", ["serve"], {})

    def stop(self) -> None:
        """End everything that was started, SkyPilot's servers and their workers included."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        ownership.clear(self.folder)

    def start_server(self) -> None:
        """Start SkyPilot's API server and let it find out which clouds there are."""
        self.sky("api", "start", timeout=300)
        self.sky("check", "aws", timeout=600)

    def run(
        self, command: list[str], *, timeout: float = 120, check: bool = True, **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command inside the cloud, with a time limit and no standard input."""
        done = subprocess.run(
            command,
            env={**self.environment, **extra},
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout * PATIENCE,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def sky(self, *words: str, timeout: float = 120, check: bool = True) -> str:
        """The output of a `sky` command."""
        done = self.run([str(BIN / "sky"), *words], timeout=timeout, check=check)
        return done.stdout + done.stderr

    def launch(
        self, *words: str, timeout: float = 120, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run the launcher's command line."""
        command = [sys.executable, "-m", "launch", *words]
        return self.run(command, timeout=timeout, check=check)

    def on_node(self, instance_id: str, script: str) -> str:
        """The output of a shell script that runs as root on the node behind an instance."""
        pid = (self.folder / "nodes" / "run" / instance_id / "pid").read_text().split()[0]
        enter = ["nsenter", "-t", pid, "-m", "-p", "--root", "--wd=/"]
        return self.run([*enter, "sh", "-c", script], timeout=300, check=False).stdout

    def client(self, service: str, region: str = "us-east-1") -> Any:
        """A boto3 client of this cloud, whatever profile the person who tests has chosen."""
        import boto3
        from botocore.session import Session

        core = Session({"profile": (None, None, None, None)})
        core.set_config_variable("config_file", os.devnull)
        return boto3.Session(botocore_session=core).client(
            service,
            region_name=region,
            endpoint_url=self.endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def sell_out(self) -> None:
        """Let EC2 have no machine for anybody, until `restock`."""
        (self.folder / "sold-out").touch()

    def restock(self) -> None:
        """Let EC2 have machines again."""
        (self.folder / "sold-out").unlink()

    def refusals(self) -> int:
        """How often EC2 has said that it is sold out."""
        path = self.folder / "refusals"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def live_instances(self, *regions: str) -> list[str]:
        """The ids of the instances that are not terminated, in the regions given or all."""
        found = []
        for region in regions or nodes.REGIONS:
            for page in self.client("ec2", region).describe_instances()["Reservations"]:
                found += [
                    instance["InstanceId"]
                    for instance in page["Instances"]
                    if instance["State"]["Name"] != "terminated"
                ]
        return found

    def live_volumes(self) -> list[str]:
        """The ids of all volumes, in all regions."""
        return [
            volume["VolumeId"]
            for region in nodes.REGIONS
            for volume in self.client("ec2", region).describe_volumes()["Volumes"]
        ]

    def _configure(self) -> None:
        config: dict[str, Any] = {}
        if self.has_spot:
            config["jobs"] = {"controller": {"consolidation_mode": True}}
        if self.has_nodes:
            proxy = f"{sys.executable} {HERE / 'nodes.py'} proxy %h"
            config["aws"] = {"ssh_proxy_command": proxy}
        path = self.home / ".sky" / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config))

    def _spawn(self, name: str, words: list[str], extra: dict[str, str]) -> None:
        log = (self.folder / f"{name}.log").open("w")
        self._processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / f"{name}.py"), *words],
                env={**self.environment, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    def _answers(self) -> bool:
        with socket.socket() as probe:
            host, port = self.endpoint.partition("//")[2].split(":")
            return probe.connect_ex((host, int(port))) == 0


def wait_until(condition: Callable[[], object], *, seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked every half second."""
    deadline = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def _furnish(cloud: SimulatedCloud) -> None:
    """What a real account has and moto's lacks: internet gateways, and SkyPilot's own role.

    SkyPilot calls a subnet public when its route table leads to a gateway. The role it would make
    itself is refused by moto, because its inline policy states no version.
    """
    for region in nodes.REGIONS:
        ec2 = cloud.client("ec2", region)
        default = [{"Name": "isDefault", "Values": ["true"]}]
        vpc = ec2.describe_vpcs(Filters=default)["Vpcs"][0]["VpcId"]
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        own = [{"Name": "vpc-id", "Values": [vpc]}]
        table = ec2.describe_route_tables(Filters=own)["RouteTables"][0]["RouteTableId"]
        ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    iam = cloud.client("iam")
    trust = '{"Version":"2012-10-17","Statement":[]}'
    iam.create_instance_profile(InstanceProfileName="skypilot-v1")
    iam.create_role(RoleName="skypilot-v1", AssumeRolePolicyDocument=trust)
    iam.add_role_to_instance_profile(InstanceProfileName="skypilot-v1", RoleName="skypilot-v1")


def _free_ports() -> tuple[int, int, int]:
    """Three ports below those that connections take, so that nobody has one when it is needed."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000, 3)
        ports = first, first + 1, first + 2
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
