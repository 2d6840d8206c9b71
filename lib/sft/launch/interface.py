"""The network interface through which a node reaches the other nodes of its job: python -m sft.launch.interface

In:  SFT_HEAD (host:port of the first node) and SFT_PEER (address of another node, for the first one), as launchers set them.
Out: the interface's name, for stages/train.sh, which gives it to gloo and NCCL.

Without it gloo takes the address that this node's own name resolves to. Debian's default for that is 127.0.1.1, and the
ranks of other nodes would wait for a connection to themselves.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys

import click

from sft.common.errors import SftError
from sft.launch.exchange import node_options
from sft.runner.cli import program

SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface (netdevice(7))."""
OUTSIDE = "192.0.2.1"
"""A documentation address (RFC 5737), which the default route leads to. Nothing is sent."""
ANY_PORT = 9


def interface_to(*hosts: str) -> str:
    """The interface of the route to the first of these hosts that is another machine's or this one's own real address;
    of the default route if each resolves to loopback only. Raises SftError where no interface has the route's address."""
    targets = [address for host in hosts if host for address in addresses(host)]
    real = [a for a in targets if not ipaddress.ip_address(a).is_loopback]
    problems = []
    for target in [*real, OUTSIDE]:
        source = source_address(target)
        if source and (name := interface_of(source)):
            return name
        problems.append(f"{target}: {f'its source {source} is on no interface' if source else 'no route'}")
    raise SftError(
        f"this node finds no interface to {', '.join(h for h in hosts if h)} ({'; '.join(problems)}); next: name it in [env] of"
        ' the cluster\'s file: GLOO_SOCKET_IFNAME = "eth0"'
    )


def addresses(host: str) -> list[str]:
    """The IPv4 addresses of a host, none for an unknown one."""
    try:
        found = socket.getaddrinfo(host, ANY_PORT, socket.AF_INET, socket.SOCK_DGRAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def source_address(target: str) -> str:
    """This machine's address on the route to an IPv4 address; "" without a route. A connected UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((target, ANY_PORT))
        except OSError:
            return ""
        return str(s.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface with this IPv4 address, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


@program("train", "python -m sft.launch.interface", signals=False)
@node_options("rank", "head")
@click.option("--peer", envvar="SFT_PEER", show_envvar=True, default="", help="Another node, for the first one.")
def main(rank: int, head: str, peer: str) -> None:
    """Prints the network interface through which this node reaches the others."""
    host = head.rpartition(":")[0]
    # The first node's own name may resolve to loopback there, so its route to another node decides.
    print(interface_to(*((peer, host) if rank == 0 else (host,))))


if __name__ == "__main__":
    sys.exit(main())
