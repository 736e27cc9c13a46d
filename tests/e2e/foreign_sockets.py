"""Attaches somebody else's programs for sockets to the root of cgroups, as Cilium does, until standard input ends.

python foreign_sockets.py PORT clears     takes all callbacks from connections to the port
python foreign_sockets.py PORT keeps      has a map of sockets and a program for messages, and keeps them there
"""

import os
import sys

from otel_nginx_ebpf.kernel import socket_propagation
from otel_nginx_ebpf.kernel.loader import import_bcc
from otel_nginx_ebpf.kernel.system_call import bpf

_TEXT = """
#include <linux/types.h>
BPF_SOCKHASH(foreign_sockets, u64, 1024);

int foreign_connection(struct bpf_sock_ops *ops)
{
    u64 cookie = bpf_get_socket_cookie(ops);
    if (ops->op != 4 || ops->remote_port != PORT) /* an active connection is established */
        return 1;
#if CLEARS
    bpf_sock_ops_cb_flags_set(ops, 0);
#else
    foreign_sockets.sock_hash_update(ops, &cookie, 0);
#endif
    return 1;
}

int foreign_message(struct sk_msg_md *msg)
{
    return SK_PASS;
}
"""


def main() -> None:
    port, what = int(sys.argv[1]), sys.argv[2]
    bcc = import_bcc()
    from bcc.libbcc import lib

    os.environ["BCC_KERNEL_SOURCE"] = os.path.join(os.path.dirname(__file__), "../../probes/stub_headers")
    network_port = (port >> 8 | (port & 0xFF) << 8) << 16  # as bpf_sock_ops has it
    text = f"#define PORT {network_port:#x}\n#define CLEARS {int(what == 'clears')}\n{_TEXT}"
    program = bcc.BPF(text=text)
    message = program.load_func(b"foreign_message", bcc.BPF.SK_MSG)
    connection = program.load_func(b"foreign_connection", bcc.BPF.SOCK_OPS)
    sockets = int(lib.bpf_table_fd(program.module, b"foreign_sockets"))
    attach = socket_propagation._AttachAttribute(sockets, message.fd, socket_propagation._SK_MSG_VERDICT)
    bpf(socket_propagation._BPF_PROG_ATTACH, attach)
    root = socket_propagation.cgroup_root()
    assert root
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    link = socket_propagation._LinkAttribute(connection.fd, directory, socket_propagation._CGROUP_SOCK_OPS)
    bpf(socket_propagation._BPF_LINK_CREATE, link)
    print("attached", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
