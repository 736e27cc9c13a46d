/* The TLS handshake of a client's connection. */

/* ngx_ssl_ocsp_validate(ngx_connection_t *c): since 1.19.0 nginx calls it when a handshake has succeeded (ngx_ssl_handshake), or when early
 * data has come (ngx_ssl_try_early_data). Where nginx checks the client's certificate over OCSP, it calls it again later. */
int enter_ngx_ssl_ocsp_validate(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    struct socket_key key = {.tgid = tgid};
    u64 connection = PT_REGS_PARM1(ctx);
    if (!process || bpf_probe_read_user(&key.fd, sizeof(key.fd), (void *)(connection + OFFSET_ngx_connection_s__fd)) != 0)
        return 0;
    struct socket *socket = sockets.lookup(&key);
    if (socket && socket->client && socket->opened_ns && !socket->requests && !socket->handshake_ns)
        socket->handshake_ns = now - socket->opened_ns;
    return 0;
}
