#!/bin/bash
# Build the machine image that every simulated instance boots from, once per folder.
# usage: build_image.sh FOLDER CHECKOUT
#
# The image is an overlay layer over this machine's own root file system, so nothing outside FOLDER
# changes: user `ubuntu` with sudo, and what SkyPilot installs on a machine (uv, ray, itself). A
# node gets the checkout's own .venv as the environment that a task's `setup` finds ready. FOLDER
# becomes a tmpfs, because the upper layer of an overlay cannot lie below its lower one.
# Needs root, overlayfs and, this once, the Python package index.
set -euo pipefail
ROOT=$1
CHECKOUT=$2
SKYPILOT=$("$CHECKOUT/.venv/bin/python" -c 'import importlib.metadata as m; print(m.version("skypilot"))')
PYTHON=$(command -v /usr/bin/python3.11 /usr/bin/python3.10 /usr/bin/python3.9 | head -n1)  # ray 2.9.3 has no newer wheels
[ -n "$PYTHON" ] || { echo "no /usr/bin/python3.9, 3.10 or 3.11" >&2; exit 1; }

mkdir -p "$ROOT"
exec 9> "$ROOT.lock"
flock 9  # two at once would build into each other
mountpoint -q "$ROOT" || mount -t tmpfs -o size=8g simcloud "$ROOT"
[ "$(cat "$ROOT/ready" 2> /dev/null)" != "$SKYPILOT" ] || exit 0
BUILD=$ROOT/build-root
umount -R "$BUILD" 2> /dev/null || true  # of a build that was killed
rm -rf "$ROOT/image" "$ROOT/build-work"
mkdir -p "$ROOT/image" "$ROOT/build-work" "$BUILD"
mount -t overlay overlay -o lowerdir=/,upperdir="$ROOT/image",workdir="$ROOT/build-work" "$BUILD"
trap 'umount -R "$BUILD" 2>/dev/null || true' EXIT
mount -t proc proc "$BUILD/proc"
mount --rbind /dev "$BUILD/dev"
mount --make-rslave "$BUILD/dev"
cat > "$BUILD/tmp/build.sh" <<EOS
set -e
id ubuntu >/dev/null 2>&1 || useradd -m -s /bin/bash ubuntu
usermod -p '*' ubuntu
mkdir -p /etc/sudoers.d /run/sshd
echo 'ubuntu ALL=(ALL) NOPASSWD:ALL' > /etc/sudoers.d/ubuntu
printf '#!/bin/sh\nexit 0\n' > /usr/local/bin/systemctl
chmod +x /usr/local/bin/systemctl
chmod 755 /root
[ -e /etc/ssh/simcloud_host_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/simcloud_host_key
su ubuntu -c '
  set -e
  cd
  mkdir -p .local/bin .ssh
  chmod 700 .ssh
  $PYTHON -m venv skypilot-runtime
  skypilot-runtime/bin/pip install -q "setuptools<70" "click<8.3.0" "ray[default]==2.9.3" "pydantic-core==2.41.1" "skypilot[aws,remote]==$SKYPILOT" uv
  cp skypilot-runtime/bin/uv .local/bin/uv
  $PYTHON -m venv sky-user-env
'
EOS
chroot "$BUILD" /bin/bash /tmp/build.sh
rm "$BUILD/tmp/build.sh"
echo "$SKYPILOT" > "$ROOT/ready"
