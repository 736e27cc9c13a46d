/* Workers that start and end. */

/* ngx_setproctitle(char *title): a process of nginx has started, and has not accepted a connection yet */
int enter_ngx_setproctitle(struct pt_regs *ctx)
{
    probed_process(current_tgid());
    return 0;
}

int sched_process_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    if ((u32)pid_tgid == tgid)
        forget_process(tgid);
#if PROPAGATE_SOCKET
    u64 task = bpf_get_current_task();
    tellings.delete(&task);
#endif
    return 0;
}
