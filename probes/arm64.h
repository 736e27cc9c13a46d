/* Everything specific to arm64: registers, system calls and struct epoll_event. x86_64.h says the same of x86-64. For the arguments of
 * functions BCC has PT_REGS_PARM1… */

/* The registers that a handler gets are struct user_pt_regs (arch/arm64/include/uapi/asm/ptrace.h): those up to pstate. Those of a
 * system call have more (arch/arm64/include/asm/ptrace.h). */
struct pt_regs {
    unsigned long regs[31];
    unsigned long sp, pc, pstate;
    unsigned long orig_x0;
    int syscallno;
};

/* There is no fork and no epoll_wait: the C library calls clone and epoll_pwait. */
#define SYS_epoll_ctl 21
#define SYS_epoll_pwait 22
#define SYS_ioctl 29
#define SYS_close 57
#define SYS_read 63
#define SYS_write 64
#define SYS_readv 65
#define SYS_writev 66
#define SYS_sendfile 71
#define SYS_newfstatat 79
#define SYS_fstat 80
#define SYS_socket 198
#define SYS_accept 202
#define SYS_connect 203
#define SYS_getsockname 204
#define SYS_sendto 206
#define SYS_recvfrom 207
#define SYS_setsockopt 208
#define SYS_getsockopt 209
#define SYS_shutdown 210
#define SYS_sendmsg 211
#define SYS_recvmsg 212
#define SYS_clone 220
#define SYS_accept4 242

/* The number and the arguments of a system call, from two places in pt_regs: the result has overwritten the first argument in x0. */
struct syscall_entry {
    unsigned long argument2;  /* x1 */
    unsigned long argument3;
    unsigned long argument4;
    unsigned long argument5;
    unsigned long argument6;
    unsigned long argument1;  /* orig_x0 */
    int number;
    int reserved;
};

static __always_inline bool read_entry(struct syscall_entry *entry, const struct pt_regs *regs)
{
    return bpf_probe_read_kernel(&entry->argument2, 5 * sizeof(entry->argument2), &regs->regs[1]) == 0
        && bpf_probe_read_kernel(&entry->argument1, 2 * sizeof(entry->argument1), &regs->orig_x0) == 0;
}

struct event {
    u32 events;
    u64 data;
};
