"""The engine nearest to a deployment: Flower's own SuperLink, and per site a SuperNode and an agent behind a socket.

Without TLS or keys: whoever can open a loopback port of this machine can talk to them. For a machine of one's own.
"""

import socket
from contextlib import ExitStack
from pathlib import Path

from client.app import SOCKET
from client.simulated import site_directories
from mmfm_core.storage import write_text
from server.bundle import write_bundle, write_values
from server.programs import Program, Programs, begin, check_completed, over, programs, wait_for
from server.record import Run

HOST = "127.0.0.1"
START_SECONDS = 120.0


def simulate(run_directory: Path) -> None:
    """Run the federation of a run directory over the sites in it.

    Raises:
        MmfmError: a Flower process ended early, or the run failed.
    """
    run_directory = run_directory.resolve()
    run, sites, folder = Run.open(run_directory), site_directories(run_directory / "sites"), run_directory / "flower"
    begin(run)
    port, *node_ports = free_ports(1 + len(sites))
    link = f"{HOST}:{port}"
    write_bundle(folder / "bundle", run)
    write_values(folder / "run.toml", {"run-directory": str(run_directory)})
    write_text(folder / "config.toml", f'[superlink.simulation]\naddress = "{link}"\ninsecure = true\n')
    with programs(folder) as started:
        # 'process', and a SuperExec of ours: the SuperLink would start its own in a session that we cannot end.
        command = f"flower-superlink --insecure --host {HOST} --port {port} --isolation process"
        superlink = started.start("superlink", command.split(), home=folder)
        wait_for(lambda: is_open(port), [superlink], START_SECONDS)
        command = f"flower-superexec --insecure --runtime-api-address {link}"
        needed = [superlink, started.start("superexec", command.split(), home=folder)]
        agents = [start_agent(started, site, folder) for site in sites]
        wait_for(lambda: all((folder / socket_of(site)).is_socket() for site in sites), agents, START_SECONDS)
        needed += agents
        for site, node_port in zip(sites, node_ports, strict=True):
            home = folder / "nodes" / site.name
            write_values(home / "node.toml", {SOCKET: socket_of(site)})
            command = f"flower-supernode --insecure --superlink {link} --host {HOST} --port {node_port}"
            command += f" --node-config nodes/{site.name}/node.toml"
            needed.append(started.start(f"supernode-{site.name}", command.split(), home))
        command = "flwr run bundle simulation --run-config run.toml --stream"
        following = started.start("run", command.split(), home=folder)
        wait_for(lambda: over(run) or following.ended, needed)
    check_completed(run, following.log)


def start_agent(started: Programs, site: Path, folder: Path) -> Program:
    """The very process that a hospital runs, but with this machine's network."""
    command: list[str | Path] = ["mmfm", "site", "run", "--agent-only", "--directory", site]
    command += ["--socket", socket_of(site)]
    return started.start(f"agent-{site.name}", command, home=folder / "nodes" / site.name)


def socket_of(site: Path) -> str:
    """Where an agent listens, from the folder in which all programs run: a socket's whole path must be short."""
    return f"nodes/{site.name}/agent.sock"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
