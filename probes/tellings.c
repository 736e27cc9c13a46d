/* --propagate on the socket: its maps. */

#define NOT_OVER_TCP 1         /* socket.peer_number: connect() was not seen by the SOCK_OPS program */

BPF_SOCKHASH(upstream_sockets, u64, SOCKETS_MAX);
BPF_TABLE("lru_hash", u64, u32, enrolling, 4096); /* socket cookie → the socket's flags before ours */
BPF_TABLE("hash", u64, struct telling, tellings, PROCESSES_MAX); /* of each worker, by its task */
BPF_ARRAY(new_tellings, struct telling, 1); /* all zero; too large for the stack */
BPF_ARRAY(socket_uses, struct socket_use, 1);
BPF_PROG_ARRAY(tellers, 1); /* tell_attempt; the verifier could not follow it as a part of sys_exit */
#define NO_TELLER 1            /* calls nothing; a program that contains a call gets no private stack */

static __always_inline struct socket_use *socket_use(void)
{
    u32 zero = 0;
    return socket_uses.lookup(&zero);
}

/* Returns a number for a TCP connection of the worker. Two connections at once with the same number would need the same ports. */
static __always_inline u64 connection_number(u32 local_port, u32 remote_port, u32 remote_address)
{
    return (u64)remote_address << 32 ^ (u64)remote_port ^ local_port ^ 1ULL << 63;
}

#define NUMBER_OF(context)                                                                                             \
    connection_number(context->local_port, context->remote_port,                                                       \
                      context->family == FAMILY_INET ? context->remote_ip4                                             \
                                                     : context->remote_ip6[0] ^ context->remote_ip6[1] ^ context->remote_ip6[2]  \
                                                           ^ context->remote_ip6[3])

static __always_inline struct telling *find_telling(void)
{
    u64 task = bpf_get_current_task();
    return tellings.lookup(&task);
}

static __always_inline struct telling *find_or_add_telling(void)
{
    u64 task = bpf_get_current_task();
    u32 zero = 0;
    struct telling *telling = tellings.lookup(&task), *fresh = new_tellings.lookup(&zero);
    if (telling || !fresh)
        return telling;
    tellings.update(&task, fresh);
    return tellings.lookup(&task);
}
