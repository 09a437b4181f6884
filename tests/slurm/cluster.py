"""A real Slurm of two nodes on this machine's loopback: slurmctld, two slurmd and munged, all under one directory."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NODES = ("lora-n1", "lora-n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_HOSTS = Path("/etc/hosts")
_HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}\n"
_FREEZER = Path("/sys/fs/cgroup/freezer")

# Nodes pretend to the size of those the scripts are for. cred_expire is what a requeued job waits for.
_SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port_controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=15
MinJobAge=3600
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} {size}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} {size}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_SIZE = "CPUs=40 SocketsPerBoard=2 CoresPerSocket=20 ThreadsPerCore=1 RealMemory=380000 Gres=gpu:8"
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


def find_obstacle() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    missing = [name for name in PROGRAMS if _which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd must be started by root"
    if not os.access(_HOSTS, os.W_OK):
        return f"{_HOSTS} cannot be written, so the nodes would have no addresses"
    return None


class Cluster:
    """Started by `start`; everything is gone after `stop`, but for `root`, which the caller owns."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        for name in ("munge", "run", "log", "state", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        if _HOSTS_LINE not in _HOSTS.read_text():
            with _HOSTS.open("a") as hosts:
                hosts.write(_HOSTS_LINE)
        ports = _find_free_ports(3)
        (self.root / "slurm.conf").write_text(
            _SLURM_CONF.format(
                root=self.root,
                host=socket.gethostname().partition(".")[0],
                nodes=NODES,
                size=_SIZE,
                proctrack=_choose_proctrack(),
                **dict(zip(("port_controller", "port_1", "port_2"), ports, strict=True)),
            )
        )
        for index in range(8):
            os.mknod(self.root / f"nvidia{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # each a /dev/null
        (self.root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.root}/nvidia[0-7]\n")
        (self.root / "cgroup.conf").write_text(_CGROUP_CONF)
        self._start_munge()
        self._call("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self._call("sinfo", "-hN", "-t", "idle", "-o", "%N").split() == list(NODES), 30)

    def _start_munge(self) -> None:
        directory = self.root / "munge"
        (directory / "key").write_bytes(os.urandom(128))
        (directory / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._call("munged", "--force", *(f"--{option}={directory / name}" for option, name in files.items()))

    def start_node(self, node: str) -> None:
        self._call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut does: its daemon and every task on it, none with time to say anything."""
        _kill(self.root / "run" / f"{node}.pid", signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            if _belongs_to(process, node, self.root):
                os.kill(int(process.name), signal.SIGKILL)

    def stop(self) -> None:
        if (self.root / "run" / "slurmctld.pid").exists():
            self._call("scancel", "--user=root", check=False)
            self.wait_for(lambda: not self._call("squeue", "-h", check=False), 30, must=False)
        pid_files = [self.root / "run" / f"{name}.pid" for name in (*NODES, "slurmctld")]
        for pid_file in (*pid_files, self.root / "munge" / "pid"):
            _kill(pid_file, signal.SIGTERM)
        for node in NODES:  # the freezer keeps empty groups
            for group in sorted(_FREEZER.glob(f"slurm_{node}/**/"), key=lambda path: -len(path.parts)):
                group.rmdir()
        _HOSTS.write_text(_HOSTS.read_text().replace(_HOSTS_LINE, ""))

    def sbatch(self, *words: str, cwd: Path, environ: Mapping[str, str]) -> str:
        """The new job's id. AssertionError with what sbatch said where it refuses."""
        return self._call("sbatch", "--parsable", *words, cwd=cwd, environ=environ)

    def describe_job(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self._call("scontrol", "-o", "show", "job", job)))

    def signal_job(self, job: str, *options: str) -> None:
        self._call("scancel", *options, job)

    def set_time_limit(self, job: str, minutes: int) -> None:
        self._call("scontrol", "update", f"job={job}", f"TimeLimit={minutes}")

    def wait_for(self, condition: Callable[[], bool], timeout_s: float, *, must: bool = True) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                assert not must, f"waited {timeout_s:.0f} s in vain\n{self._call('squeue', '-l', check=False)}"
                return
            time.sleep(0.25)

    def _call(
        self, *words: str, check: bool = True, cwd: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            words,
            env={**self.environ, **(environ or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            restore_signals=False,  # a client that finds munged busy then asks again, where SIGPIPE would end it
        )
        said = f"{' '.join(words)} ({done.returncode}): {done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, said
        return done.stdout.strip()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _which(name: str) -> str | None:
    return shutil.which(name, path=_path())


def _find_free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _choose_proctrack() -> str:
    """cgroup, as clusters have it: a signal reaches the process that srun started, not its children."""
    group = _FREEZER / f"lora_dist_{os.getpid()}"
    try:
        group.mkdir()
        group.rmdir()
    except OSError:
        return "proctrack/linuxproc"
    return "proctrack/cgroup"


def _kill(pid_file: Path, number: signal.Signals) -> None:
    """Stop a daemon of ours and wait until it is gone."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    pid_file.unlink(missing_ok=True)
    name = Path(f"/proc/{pid}/comm")
    if not name.exists() or name.read_text().strip() not in PROGRAMS:
        return
    os.kill(pid, number)
    deadline = time.monotonic() + 20
    while name.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _belongs_to(process: Path, node: str, root: Path) -> bool:
    """A task on `node` or the daemon's helper that watches it, of this cluster and no other."""
    try:
        environ = (process / "environ").read_bytes().split(b"\0")
        words = (process / "cmdline").read_bytes()
    except OSError:
        return False
    is_ours = f"SLURM_CONF={root / 'slurm.conf'}".encode() in environ
    is_task = f"SLURMD_NODENAME={node}".encode() in environ
    return is_ours and (is_task or (words.startswith(b"slurmstepd") and node.encode() in words))
