#!/bin/bash
# Pid 1 to be of one simulated instance; runs in fresh mount, uts, ipc, net and pid namespaces.
# Environment: NODE (its folder), ROOT (of the image), SOCK (folder of the cloud's socket), CHECKOUT,
# IP, REGION, TYPE, ENDPOINT, KEYS (ssh).
set -e
cd "$NODE"
mkdir -p up work root
mount --make-rprivate /
mount -t overlay overlay -o lowerdir="$ROOT/image:/",upperdir="$NODE/up",workdir="$NODE/work" root
mount -t proc proc root/proc
sed "s/^btime .*/btime $(date +%s)/" /proc/stat > stat  # when this machine, not the host, was booted
mount --bind stat root/proc/stat
mount -t sysfs sys root/sys
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/dev/shm
mount -t tmpfs tmpfs root/run
mkdir -p root/run/sshd root/run/cloud
mount --bind "$SOCK" root/run/cloud
mount -t tmpfs -o mode=1777 tmpfs root/tmp
NAME=ip-${IP//./-}
hostname "$NAME"
printf '127.0.0.1 localhost\n%s %s\n' "$IP" "$NAME" > root/etc/hosts
printf '%s\n' "$KEYS" > root/home/ubuntu/.ssh/authorized_keys
VENV=$(realpath "$CHECKOUT/.venv")  # below a mount of its own, or /tmp, the overlay would not show it
mkdir -p "root$VENV"
mount --bind "$VENV" "root$VENV"
ln -sfn "$VENV" root/home/ubuntu/casallm-venv
chroot root chown -R ubuntu: /home/ubuntu/.ssh
ip link set lo up
ip addr add 169.254.169.254/32 dev lo
for _ in $(seq 100); do
  ip link show eth0 > /dev/null 2>&1 && break
  sleep 0.02
done
ip addr add "$IP/16" dev eth0
ip link set eth0 up
cat > root/etc/ssh/sshd_simcloud <<EOS
HostKey /etc/ssh/simcloud_host_key
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
MaxSessions 200
MaxStartups 200
Subsystem sftp internal-sftp
SetEnv PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin RAY_worker_niceness=0 UV_OFFLINE=1 AWS_ENDPOINT_URL=$ENDPOINT AWS_DEFAULT_REGION=$REGION
EOS
# The instance metadata service: moto's, which knows the credentials of the instance profile, and on
# top the spot notice (the file /run/spot) and what moto does not answer (tokens, the machine's type).
cat > root/usr/local/sbin/imds <<'EOS'
#!/bin/bash
read -r line
answer() { printf 'HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %s\r\nConnection: close\r\n\r\n%s' "$1" ${#2} "$2"; }
case $line in
*/spot/instance-action*) if [ -s /run/spot ]; then answer '200 OK' "$(cat /run/spot)"; else answer '404 Not Found' ''; fi ;;
*/api/token*) answer '200 OK' token ;;
*/meta-data/instance-type*) answer '200 OK' "$(cat /run/instance-type)" ;;
*) { printf '%s\n' "$line"; cat; } | socat - UNIX-CONNECT:/run/cloud/aws.sock ;;
esac
EOS
chmod +x root/usr/local/sbin/imds
printf '%s' "$TYPE" > root/run/instance-type
PORT=${ENDPOINT##*:}
# bash stays as pid 1 and reaps orphans; the fake cloud answers at the same loopback address as on
# the host, so that no packet leaves the machine.
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PORT="$PORT" chroot root /bin/bash -c '
cd /
socat TCP-LISTEN:"$PORT",bind=127.0.0.1,reuseaddr,fork UNIX-CONNECT:/run/cloud/aws.sock &
socat TCP-LISTEN:80,bind=169.254.169.254,reuseaddr,fork EXEC:/usr/local/sbin/imds &
/usr/sbin/sshd -D -e -f /etc/ssh/sshd_simcloud &
while :; do sleep 1000 & wait $!; done'
