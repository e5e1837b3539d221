"""Real, tiny Linux machines behind moto's EC2: every instance that moto calls running is a node.

    nodes.py serve             boot a node for each running instance, kill it when moto no longer
                               says "running" (preempted, torn down), forget its disk with it;
                               SIGTERM kills all nodes and removes their network
    nodes.py proxy IP          connect stdin and stdout to port 22 of the node with that address:
                               SkyPilot's `aws.ssh_proxy_command`
    nodes.py notice ID SECONDS let the node's metadata service announce a spot reclaim

A node has its own mount, pid, uts, ipc and network namespace; its root file system is an overlay
over this machine's (the image layer is made by build_image.sh). It reaches nothing but its loopback
and the other nodes. `serve` is the parent of the nodes and the proxy only copies bytes, because
SkyPilot's API server kills every process that it saw below an ssh client which has ended.

Environment: SIMCLOUD_ROOT, SIMCLOUD_MARK, AWS_ENDPOINT_URL. Uses the standard library only: the
proxy runs for every ssh connection.
"""

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REGIONS = ("us-east-1", "us-east-2", "us-west-2")
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
UNSHARE = ("--fork", "--kill-child", "--mount-proc")
HERE = Path(__file__).resolve().parent
KEY = re.compile(r"(ssh-(?:rsa|ed25519) [A-Za-z0-9+/=]+)")


@dataclass(frozen=True)
class Instance:
    """What EC2 says of one instance."""

    id: str
    state: str
    type: str
    private_ip: str
    public_ip: str
    region: str


def root() -> Path:
    """The folder of the image, which all clouds on this machine share."""
    return Path(os.environ["SIMCLOUD_ROOT"])


def place() -> Path:
    """The folder of this cloud's nodes, their log and their sockets, beside the image."""
    return (Path(os.environ["SIMCLOUD_MARK"]) / "nodes").resolve()


def endpoint() -> str:
    """Where moto answers."""
    return os.environ["AWS_ENDPOINT_URL"]


def network() -> str:
    """The namespace that holds the bridge between the nodes."""
    return f"sim{endpoint().rpartition(':')[2]}"


def log(*words: object) -> None:
    """One line in the simulation's log."""
    with (place() / "nodes.log").open("a") as file:
        print(time.strftime("%H:%M:%S"), *words, file=file)


def ec2(region: str, action: str) -> str:
    """The XML with which moto answers an EC2 query."""
    scope = f"test/20260101/{region}/ec2/aws4_request"
    headers = {
        "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=x",
        "Host": f"ec2.{region}.amazonaws.com",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    body = f"Version=2016-11-15&Action={action}".encode()
    request = urllib.request.Request(endpoint(), data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def instances() -> list[Instance]:
    """Every instance that moto remembers, the terminated ones included."""
    found = []
    for region in REGIONS:
        for chunk in ec2(region, "DescribeInstances&MaxResults=1000").split("<instanceId>")[1:]:
            state = re.search(r"<instanceState>.*?<name>([^<]*)</name>", chunk, re.DOTALL)
            found.append(
                Instance(
                    chunk.partition("<")[0],
                    state[1] if state else "?",
                    _field(chunk, "instanceType"),
                    _field(chunk, "privateIpAddress"),
                    _field(chunk, "ipAddress"),
                    region,
                )
            )
    return found


def node_pid(instance_id: str) -> int | None:
    """The pid of the node's init on this host; its start time guards against a pid used again."""
    try:
        pid, start = (place() / "run" / instance_id / "pid").read_text().split()
        return int(pid) if _started(pid) == start else None
    except (OSError, ValueError):
        return None


def boot(instance: Instance) -> None:
    """Start the node of `instance` and plug it into the bridge."""
    began, folder = time.monotonic(), place() / "run" / instance.id
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "NODE": str(folder),
        "ROOT": str(root()),
        "SOCK": str(place() / "sock"),
        "CHECKOUT": str(HERE.parents[1]),
        "IP": instance.private_ip,
        "ENDPOINT": endpoint(),
        "REGION": instance.region,
        "TYPE": instance.type,
        "KEYS": "\n".join(_public_keys(instance)),
    }
    with (folder / "boot.log").open("w") as out:
        unshare = subprocess.Popen(
            ["unshare", *NAMESPACES, *UNSHARE, "bash", str(HERE / "boot_node.sh")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    pid = _only_child(unshare)
    if pid is None:
        log("boot failed", instance.id, (folder / "boot.log").read_text())
        return
    port = f"v{instance.id[-12:]}"
    _shell(
        f"ip link add {port} netns {network()} type veth peer name eth0 netns {pid}"
        f" && ip -n {network()} link set {port} master br0 up"
    )
    (folder / "pid").write_text(f"{pid} {_started(pid)}")
    (folder / "addresses").write_text(f"{instance.private_ip} {instance.public_ip}")
    log("booted", instance.id, instance.private_ip, f"{time.monotonic() - began:.2f}s")


def kill(instance_id: str) -> None:
    """Kill the node: with the init of a pid namespace the kernel kills all the rest."""
    pid = node_pid(instance_id)
    if pid:
        os.kill(pid, signal.SIGKILL)
        log("killed", instance_id)


def notice(instance_id: str, seconds: float) -> None:
    """Announce a spot reclaim in `seconds`; whoever calls terminates the instance then."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    command = ["nsenter", "-t", str(node_pid(instance_id)), "-m", "--root", "--wd=/"]
    subprocess.run(
        [*command, "tee", "/run/spot"],
        input=f'{{"action": "terminate", "time": "{when}"}}'.encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def proxy(address: str) -> None:
    """Become the connection to the node's sshd; asks the disk only, it runs all the time."""
    for file in (place() / "run").glob("*/addresses"):
        pid = node_pid(file.parent.name) if address in file.read_text().split() else None
        if pid:
            target = "TCP:127.0.0.1:22,retry=50,interval=0.1"
            os.execvp("nsenter", ["nsenter", "-t", str(pid), "-n", "socat", "-", target])
    log("no running node has", address)
    sys.exit(255)


def serve(period: float = 0.5) -> None:
    """Keep the nodes as moto says they are, until SIGTERM."""
    run = place() / "run"
    (place() / "sock").mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    (Path(os.environ["SIMCLOUD_MARK"]) / "network").write_text(network())
    _shell(f"ip netns del {network()}")  # the port, and so the name, may have been another's
    _shell(
        f"ip netns add {network()} && ip -n {network()} link add br0 type bridge"
        f" && ip -n {network()} link set br0 up"
    )
    socket = place() / "sock" / "aws.sock"
    socket.unlink(missing_ok=True)
    relay = subprocess.Popen(
        ["socat", f"UNIX-LISTEN:{socket},mode=777,fork", f"TCP:{endpoint().partition('//')[2]}"]
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            try:
                _follow(run)
            except (OSError, IndexError) as error:
                log("serve", repr(error))
            time.sleep(period)
    finally:
        relay.terminate()
        for folder in run.iterdir():
            kill(folder.name)
        _shell(f"ip netns del {network()}")


def _follow(run: Path) -> None:
    """Boot what runs, kill what does not, forget what is gone."""
    now = {instance.id: instance for instance in instances()}
    for instance in now.values():
        if instance.state == "running" and not node_pid(instance.id):
            boot(instance)
    for folder in run.iterdir():
        state = now[folder.name].state if folder.name in now else "terminated"
        if state != "running":
            kill(folder.name)
        if state == "terminated":
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _field(chunk: str, tag: str) -> str:
    match = re.search(f"<{tag}>([^<]*)</{tag}>", chunk)
    return match[1] if match else ""


def _public_keys(instance: Instance) -> list[str]:
    """cloud-init's one job that matters: the public keys in the user data."""
    action = f"DescribeInstanceAttribute&Attribute=userData&InstanceId={instance.id}"
    match = re.search(r"<value>([^<]*)</value>", ec2(instance.region, action))
    text = match[1] if match else ""
    with contextlib.suppress(ValueError):
        text = base64.b64decode(text).decode()
    return KEY.findall(text)


def _started(pid: int | str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def _only_child(process: "subprocess.Popen[bytes]") -> int | None:
    """unshare's child, which is the node's pid 1."""
    for _ in range(200):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    return None


def _shell(command: str) -> None:
    subprocess.run(command, shell=True, check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case ["proxy", address]:
            proxy(address)
        case ["notice", instance_id, seconds]:
            notice(instance_id, float(seconds))
        case _:
            sys.exit(__doc__)
